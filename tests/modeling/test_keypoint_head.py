"""The keypoint head: parity with detectron2's, empty inputs, both front ends."""

from collections.abc import Callable, Iterator

import pytest
import torch
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead, build_keypoint_head
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
from detectron2.modeling.roi_heads.roi_heads import select_proposals_with_visible_keypoints
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

from benchmark.cuda_rules import CudaRules
from mask_rcnn_plugin import add_mask_rcnn_config
from mask_rcnn_plugin.modeling import MaskRCNNKeypointHead
from mask_rcnn_plugin.modeling.keypoint_head import keypoint_loss, select_visible

Check = Callable[..., None]
Make = Callable[..., Instances]
Tensors = tuple[torch.Tensor, torch.Tensor]

SHAPE = ShapeSpec(channels=6, height=7, width=7)


def make(**kwargs: object) -> MaskRCNNKeypointHead:
    return MaskRCNNKeypointHead(SHAPE, **{"num_keypoints": 3, "conv_dims": (8, 10), **kwargs})


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    """detectron2's loss counts the batches without a keypoint there."""
    with EventStorage() as storage:
        yield storage


def detections(*counts: int) -> list[Instances]:
    generator = torch.Generator().manual_seed(3)
    results = []
    for n in counts:
        corners = torch.rand(n, 2, generator=generator) * 50
        sizes = torch.rand(n, 2, generator=generator) * 40 + 1
        boxes = torch.cat([corners, corners + sizes], dim=1)
        results.append(Instances((96, 128), pred_boxes=Boxes(boxes)))
    return results


@pytest.mark.parametrize("normalizer", ["visible", 16.0])
def test_parity_in_training(
    normalizer: float | str, redraw: Check, proposals: Make, assert_same_training: Check
) -> None:
    arguments = {
        "num_keypoints": 3,
        "conv_dims": (8, 10),
        "loss_normalizer": normalizer,
        "loss_weight": 2.5,
    }
    theirs = KRCNNConvDeconvUpsampleHead(SHAPE, **arguments)
    redraw(theirs)
    ours = MaskRCNNKeypointHead(SHAPE, **arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = [proposals(2), proposals(0), proposals(3)]
    x = torch.randn(5, 6, 7, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, losses = theirs(y, batch), ours(x, batch)
    assert_same_training((ours, losses, [x]), (theirs, expected, [y]))


def test_parity_in_inference(redraw: Check, assert_near: Check) -> None:
    theirs = KRCNNConvDeconvUpsampleHead(SHAPE, num_keypoints=3, conv_dims=(8, 10)).eval()
    redraw(theirs)
    ours = make().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(5, 6, 7, 7, generator=torch.Generator().manual_seed(1))
    assert_near(ours.layers(x), theirs.layers(x))
    results, expected = ours(x, detections(2, 0, 3)), theirs(x, detections(2, 0, 3))
    for i, j in zip(results, expected, strict=True):
        assert_near(i.pred_keypoints, j.pred_keypoints)
    assert [len(i.pred_keypoints) for i in results] == [2, 0, 3]


def test_the_papers_defaults() -> None:
    with torch.device("meta"):
        head = MaskRCNNKeypointHead(ShapeSpec(channels=256))
        out = head.layers(torch.zeros(2, 256, 14, 14))
    assert out.shape == (2, 17, 56, 56)
    convolutions = [(k, v.shape) for k, v in head.state_dict().items() if k.endswith("weight")]
    assert [k for k, _ in convolutions] == [
        *(f"conv_fcn{i}.weight" for i in range(1, 9)),
        "score_lowres.weight",
    ]
    assert all(shape[0] == 512 for _, shape in convolutions)
    assert convolutions[1][1] == (512, 512, 3, 3)
    assert head.loss_normalizer == "visible"


def test_loss_is_the_mean_over_labelled_keypoints(proposals: Make) -> None:
    head = make(loss_weight=2.0)
    for p in head.parameters():
        torch.nn.init.zeros_(p)
    # All cells alike: each keypoint costs the log of the number of cells, 28 x 28.
    loss = head(torch.randn(3, 6, 7, 7), [proposals(3)])["loss_keypoint"]
    torch.testing.assert_close(loss, 2 * torch.tensor(28.0**2).log())


def test_a_channels_last_head_trains(redraw: Check, proposals: Make) -> None:
    head = make()
    redraw(head)
    x = torch.randn(3, 6, 7, 7)
    expected = head(x, [proposals(3)])["loss_keypoint"]
    layout = torch.channels_last
    loss = head.to(memory_format=layout)(x.contiguous(memory_format=layout), [proposals(3)])
    torch.testing.assert_close(loss["loss_keypoint"], expected)


def test_fixed_normalizer_counts_the_images(redraw: Check, proposals: Make) -> None:
    head = make(loss_normalizer=10.0)
    redraw(head)
    x = torch.randn(3, 6, 7, 7)
    one = head(x, [proposals(3)])["loss_keypoint"]
    two = head(x, [proposals(3), proposals(0)])["loss_keypoint"]
    torch.testing.assert_close(one, 2 * two)


@pytest.mark.parametrize("normalizer", ["visible", 16.0])
def test_no_positive_roi(normalizer: float | str, proposals: Make, assert_idle: Check) -> None:
    head = make(loss_normalizer=normalizer)
    assert_idle(head(torch.zeros(0, 6, 7, 7), [proposals(0)] * 2)["loss_keypoint"], head)


@pytest.mark.parametrize("normalizer", ["visible", 16.0])
def test_no_visible_keypoint(
    normalizer: float | str, redraw: Check, proposals: Make, assert_idle: Check
) -> None:
    head = make(loss_normalizer=normalizer)
    redraw(head)
    batch = [proposals(3)]
    batch[0].gt_keypoints.tensor[..., 2] = 0
    assert_idle(head(torch.randn(3, 6, 7, 7), batch)["loss_keypoint"], head)


def positives(*counts: int, seed: int = 0) -> list[Instances]:
    """Of each image: boxes, and keypoints labelled or not, in them, on their border and outside."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for n in counts:
        corners = torch.rand(n, 2, generator=generator) * 50
        boxes = torch.cat([corners, corners + 1 + torch.rand(n, 2, generator=generator) * 40], 1)
        places = torch.rand(n, 5, 2, generator=generator) * 1.4 - 0.2
        places = boxes[:, None, :2] + places * (boxes[:, None, 2:] - boxes[:, None, :2])
        if n:
            places[:, 0] = boxes[:, 2:]
            places[0] += 100
        visibility = torch.randint(3, (n, 5, 1), generator=generator).float()
        if n > 1:
            visibility[1] = 0
        i = Instances((128, 128), proposal_boxes=Boxes(boxes), gt_classes=torch.arange(n))
        if n:  # detectron2 gives an image without objects none of their fields
            i.gt_keypoints = Keypoints(torch.cat([places, visibility], dim=2))
            i.gt_masks = PolygonMasks([[[k, 0, 9, 0, 9, 9]] for k in range(n)])
        batch.append(i)
    return batch


def loss_and_gradient(loss: Check, batch: list[Instances], *normalizer: float | None) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shape = (sum(map(len, batch)), 5, 8, 8)
    logits = (5 * torch.randn(shape, generator=generator)).requires_grad_()
    value = loss(logits, batch, *normalizer)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("normalizer", [None, 7.5])
@pytest.mark.parametrize("counts", [(4, 0, 3), (1,), (2,), (0, 0)])
def test_loss_is_detectron2s(counts: tuple[int, ...], normalizer: float | None) -> None:
    batch = positives(*counts)
    ours = loss_and_gradient(keypoint_loss, batch, normalizer)
    theirs = loss_and_gradient(keypoint_rcnn_loss, batch, normalizer)
    torch.testing.assert_close(ours, theirs)
    assert theirs[0] > 1 or max(counts) < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        logits = torch.randn(7, 5, 8, 8).to(dtype)
        ours, theirs = (
            f(logits, positives(4, 3), None) for f in (keypoint_loss, keypoint_rcnn_loss)
        )
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_a_loss_without_positives_is_counted(storage: EventStorage) -> None:
    """As detectron2 counts them in all of the training."""
    for _ in range(2):
        keypoint_loss(torch.zeros(0, 5, 8, 8), positives(0, 0), None)
    (last, _), (before, _) = (
        storage.histories()["kpts_num_skipped_batches"].values()[i] for i in (-1, -2)
    )
    assert last == before + 1


@pytest.mark.parametrize("normalizer", ["visible", 16.0])
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0)])
def test_training_does_not_wait_for_a_gpu(counts: tuple[int, ...], normalizer: str | float) -> None:
    head = make(num_keypoints=5, loss_normalizer=normalizer)
    x = torch.randn(sum(counts), 6, 7, 7)
    with CudaRules() as cuda:
        head.to("cuda")
        x, batch = x.to("cuda"), [i.to("cuda") for i in positives(*counts)]
        with cuda.counted() as cost:
            head(x, batch)["loss_keypoint"].backward()
        assert cost.totals()[:2] == (0, 0), cost.lines()


@pytest.mark.parametrize("counts", [(4, 0, 7), (1,), (0, 2, 0), (9, 8, 7, 6)])
def test_selection_is_detectron2s(counts: tuple[int, ...], storage: EventStorage) -> None:
    name = "keypoint_head/num_fg_samples"
    batch = positives(*counts)
    ours, scalar = select_visible(batch), storage.latest().get(name)
    theirs = select_proposals_with_visible_keypoints(batch)
    assert scalar == storage.latest()[name]
    assert [len(i) for i in batch] == list(counts)
    for i, j in zip(ours, theirs, strict=True):
        assert i.image_size == j.image_size
        assert i.get_fields().keys() == j.get_fields().keys()
        for field in i.get_fields():
            a, b = (getattr(x.get(field), "tensor", x.get(field)) for x in (i, j))
            if field == "gt_masks":
                a, b = ([p[0].tolist() for p in x.polygons] for x in (a, b))
                assert a == b
            else:
                assert torch.equal(a, b), field


def test_selection_among_nothing(storage: EventStorage) -> None:
    assert [len(i) for i in select_visible(positives(0, 0))] == [0, 0]
    assert storage.latest()["keypoint_head/num_fg_samples"][0] == 0


def test_selection_waits_for_a_gpu_once() -> None:
    with CudaRules() as cuda:
        batch = [i.to("cuda") for i in positives(5, 0, 9, 3)]
        with cuda.counted() as cost:
            select_visible(batch)
        assert cost.totals()[:2] == (1, 0), cost.lines()


def test_inference_waits_for_a_gpu_twice() -> None:
    head = make().eval()
    x, batch = torch.randn(5, 6, 7, 7), detections(2, 0, 3)
    expected = head(x, batch)
    with CudaRules() as cuda:
        head.to("cuda")
        x, batch = x.to("cuda"), [i.to("cuda") for i in detections(2, 0, 3)]
        with cuda.counted() as cost:
            results = head(x, batch)
        assert cost.totals()[0] <= 4, cost.lines()
        assert cost.totals()[2] <= 300, cost.lines()
        results = [i.pred_keypoints.cpu() for i in results]
    for i, j in zip(results, expected, strict=True):
        torch.testing.assert_close(i, j.pred_keypoints, rtol=1e-3, atol=1e-3)


def test_no_detection() -> None:
    results = make().eval()(torch.zeros(0, 6, 7, 7), detections(0, 0))
    assert [i.pred_keypoints.shape for i in results] == [(0, 3, 3)] * 2


@pytest.mark.parametrize("by_visible", [True, False])
def test_yaml_and_lazy_config_give_equal_heads(by_visible: bool) -> None:
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "MaskRCNNKeypointHead"
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (8, 10)
    cfg.MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT = 0.5
    cfg.MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = by_visible
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    from_yaml = build_keypoint_head(cfg, SHAPE)
    from_lazy = instantiate(
        LazyCall(MaskRCNNKeypointHead)(
            input_shape=LazyCall(ShapeSpec)(channels=6),
            num_keypoints=3,
            conv_dims=[8, 10],
            loss_weight=0.5,
            loss_normalizer="visible" if by_visible else 3 * 64 * 0.25,
        )
    )
    assert type(from_yaml) is type(from_lazy) is MaskRCNNKeypointHead
    assert from_yaml.loss_normalizer == from_lazy.loss_normalizer
    assert from_yaml.loss_weight == from_lazy.loss_weight == 0.5
    shapes = [{k: v.shape for k, v in h.state_dict().items()} for h in (from_yaml, from_lazy)]
    assert shapes[0] == shapes[1]
