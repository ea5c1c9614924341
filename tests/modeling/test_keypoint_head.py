"""The keypoint head: parity with detectron2's, empty inputs, both front ends."""

from collections.abc import Callable, Iterator

import pytest
import torch
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead, build_keypoint_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from mask_rcnn_plugin import add_mask_rcnn_config
from mask_rcnn_plugin.modeling import MaskRCNNKeypointHead

Check = Callable[..., None]
Make = Callable[..., Instances]

SHAPE = ShapeSpec(channels=6, height=7, width=7)


def make(**kwargs: object) -> MaskRCNNKeypointHead:
    return MaskRCNNKeypointHead(SHAPE, **{"num_keypoints": 3, "conv_dims": (8, 10), **kwargs})


@pytest.fixture(autouse=True)
def storage() -> Iterator[None]:
    """detectron2's loss counts the batches without a keypoint there."""
    with EventStorage():
        yield


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
