"""The RPN and its anchors against detectron2's own."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor
from torchvision.models.detection import anchor_utils, image_list

from mask_rcnn_plugin.fast import proposals as fast_proposals
from mask_rcnn_plugin.modeling import (
    MaskRCNNAnchorGenerator,
    MaskRCNNRPN,
    TorchvisionAnchorGenerator,
)

Check = Callable[..., None]

SIZES = [(90, 128), (96, 100)]
ANCHORS = {
    "sizes": [[16, 24], [40, 64]],
    "aspect_ratios": [0.5, 1.0, 2.0],
    "strides": [8, 16],
    "offset": 0.25,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_anchors_are_detectron2s(dtype: torch.dtype) -> None:
    features = [torch.zeros(1, 1, 13, 17), torch.zeros(1, 1, 7, 9)]
    ours = MaskRCNNAnchorGenerator(**ANCHORS).to(dtype)(features)
    theirs = DefaultAnchorGenerator(**ANCHORS).to(dtype)(features)
    assert [len(level) for level in ours] == [13 * 17 * 6, 7 * 9 * 6]
    for level, expected in zip(ours, theirs, strict=True):
        assert level.tensor.dtype == expected.tensor.dtype
        assert torch.allclose(level.tensor, expected.tensor, rtol=1e-7, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["eager", "script", "trace"])
def test_torchvisions_anchors_are_its_own(how: str) -> None:
    """At 5 x 7 cells of the level before, the coarsest has its own strides: 53 and 56 pixels."""
    sizes, ratios = [[32], [64], [128]], [0.5, 1.0, 2.0]
    theirs = anchor_utils.AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * 3)
    ours = TorchvisionAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=[16, 32, 64])

    class AsTensors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = ours

        def forward(self, x: list[Tensor]) -> list[Tensor]:
            return self.generator._grid_anchors([[f.shape[2], f.shape[3]] for f in x])

    run = AsTensors()
    if how == "script":
        run = torch.jit.script(run)
    elif how == "trace":
        other = [torch.zeros(1, 1, n, n) for n in (8, 4, 2)]
        run = torch.jit.trace(run, (other,), check_trace=False)
    features = [torch.zeros(1, 1, *size) for size in ((10, 14), (5, 7), (3, 4))]
    (expected,) = theirs(image_list.ImageList(torch.zeros(1, 3, 160, 224), [(160, 224)]), features)
    got = torch.cat(list(run(features)))
    assert torch.equal(got, expected)
    assert set(got[-12 * 3 :: 3][:, 0].diff().tolist()) == {56.0, -168.0}


def build(kind: type[RPN], redraw: Check, **changes: object) -> RPN:
    arguments = {
        "in_features": ["a", "b"],
        "head": StandardRPNHead(in_channels=8, num_anchors=6),
        "anchor_generator": (DefaultAnchorGenerator if kind is RPN else MaskRCNNAnchorGenerator)(
            **ANCHORS
        ),
        "anchor_matcher": Matcher([0.3, 0.6], [0, -1, 1], allow_low_quality_matches=True),
        "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        # All that may be: which are sampled of more is left to chance.
        "batch_size_per_image": 10_000,
        "positive_fraction": 1.0,
        "pre_nms_topk": (60, 50),
        "post_nms_topk": (25, 20),
        "smooth_l1_beta": 0.1,
        "loss_weight": {"loss_rpn_cls": 1.0, "loss_rpn_loc": 2.0},
    }
    rpn = kind(**arguments | changes)
    redraw(rpn)
    return rpn


def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"a": (2, 8, 12, 16), "b": (2, 8, 6, 8)}
    return {k: torch.randn(s, generator=generator).requires_grad_() for k, s in shapes.items()}


def objects(*counts: int) -> list[Instances]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for size, n in zip(SIZES, counts, strict=True):
        corners = torch.rand(n, 2, 2, generator=generator) * torch.tensor(size[::-1])
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 4], dim=1)
        found.append(Instances(size, gt_boxes=Boxes(boxes)))
    return found


IMAGES = ImageList(torch.zeros(2, 3, 96, 128), SIZES)


def run(rpn: RPN, x: dict[str, Tensor], gt: list[Instances] | None = None, iteration: int = 0):  # type: ignore[no-untyped-def]
    with EventStorage(iteration) as storage:
        proposals, losses = rpn(IMAGES, x, gt)
    return proposals, losses, storage.latest()


def same_proposals(ours: list[Instances], theirs: list[Instances]) -> None:
    for i, j in zip(ours, theirs, strict=True):
        assert i.image_size == j.image_size
        assert len(i) == len(j)
        assert i.get_fields().keys() == j.get_fields().keys()
        assert torch.allclose(i.objectness_logits, j.objectness_logits, atol=1e-6)
        assert torch.allclose(i.proposal_boxes.tensor, j.proposal_boxes.tensor, atol=1e-4)


@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (0, 0)])
@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_losses_gradients_and_proposals_agree(
    counts: tuple[int, int], loss_type: str, redraw: Check, assert_near: Check
) -> None:
    ours, theirs = (build(kind, redraw, box_reg_loss_type=loss_type) for kind in (MaskRCNNRPN, RPN))
    x, y = features(), features()
    proposals, losses, _ = run(ours, x, objects(*counts))
    expected_proposals, expected, _ = run(theirs, y, objects(*counts))
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert_near(losses[name], loss, name)
        assert bool(loss > 0) == (name == "loss_rpn_cls" or sum(counts) > 0)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_near(p.grad, q.grad, name, least=1e-3)
    for name in x:
        assert_near(x[name].grad, y[name].grad, name)
    same_proposals(proposals, expected_proposals)
    assert [len(p) for p in proposals] == [25, 25]


def test_anchors_outside_are_left_out(redraw: Check, assert_near: Check) -> None:
    ours, theirs = (build(kind, redraw, anchor_boundary_thresh=0) for kind in (MaskRCNNRPN, RPN))
    losses, expected = (run(rpn, features(), objects(3, 5))[1] for rpn in (ours, theirs))
    for name, loss in expected.items():
        assert_near(losses[name], loss, name)


@pytest.mark.parametrize("min_box_size", [0.0, 20.0])
def test_proposals_agree(min_box_size: float, redraw: Check) -> None:
    ours, theirs = (build(k, redraw, min_box_size=min_box_size).eval() for k in (MaskRCNNRPN, RPN))
    results, expected = (run(rpn, features())[0] for rpn in (ours, theirs))
    assert 5 < len(expected[0]) <= 20
    same_proposals(results, expected)
    assert results[0].objectness_logits.requires_grad is False


def test_fewer_proposals_than_wanted(redraw: Check) -> None:
    ours, theirs = (build(k, redraw, post_nms_topk=(999, 999)).eval() for k in (MaskRCNNRPN, RPN))
    results, expected = (run(rpn, features())[0] for rpn in (ours, theirs))
    assert len(expected[0]) != len(expected[1])
    same_proposals(results, expected)


def test_images_in_parts(redraw: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where a batch is too large for one NMS."""
    rpn = build(MaskRCNNRPN, redraw).eval()
    expected = run(rpn, features())[0]
    calls = []

    def on_cuda(boxes: Tensor, *args: object) -> Tensor:
        calls.append(len(boxes))
        return nms(boxes, *args)

    nms = fast_proposals.batched_nms
    monkeypatch.setattr(fast_proposals, "batched_nms", on_cuda)
    monkeypatch.setattr(fast_proposals, "BOXES_AT_ONCE", 110)
    same_proposals(run(rpn, features())[0], expected)
    assert calls == [100, 100]


def test_a_diverged_model(redraw: Check) -> None:
    ours, theirs = build(MaskRCNNRPN, redraw), build(RPN, redraw)
    x = features()
    x["a"].data[0, :, 3, 3] = math.nan
    for rpn in (ours, theirs):
        with pytest.raises(FloatingPointError, match="Inf/NaN"):
            run(rpn, x, objects(2, 2))
    results, expected = (run(rpn.eval(), x)[0] for rpn in (ours, theirs))
    same_proposals(results, expected)
    assert all(p.proposal_boxes.tensor.isfinite().all() for p in results)


class FewAnchors:
    """Trains on the first positive and the first negative."""

    def _subsample_labels(self, label: Tensor) -> Tensor:
        first = [int((label == kind).nonzero()[0]) for kind in (0, 1)]
        label.fill_(-1)
        label[first] = torch.tensor([0, 1], dtype=label.dtype)
        return label


class NegativesAlone:
    """Its labels are detectron2's lists."""

    def label_and_sample_anchors(self, *args):  # type: ignore[no-untyped-def]
        labels, gt_boxes = RPN.label_and_sample_anchors(self, *args)
        return [label.clamp(max=0) for label in labels], gt_boxes


class PositivesCounted:
    """Its losses are of detectron2's lists."""

    def losses(self, anchors, logits, gt_labels, *args):  # type: ignore[no-untyped-def]
        number = sum((label == 1).sum() for label in gt_labels)
        return super().losses(anchors, logits, gt_labels, *args) | {"positives": number}


class MovedProposals:
    def _decode_proposals(self, *args):  # type: ignore[no-untyped-def]
        return [boxes + 7 for boxes in super()._decode_proposals(*args)]


class OfTheFirst(Matcher):
    def __call__(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        matches, labels = super().__call__(quality)
        return matches.zero_(), labels


@pytest.mark.parametrize(
    "override", [FewAnchors, NegativesAlone, PositivesCounted, MovedProposals, OfTheFirst]
)
def test_what_is_overridden_counts(override: type, redraw: Check, assert_near: Check) -> None:
    results = []
    for kind in (MaskRCNNRPN, RPN):
        if override is OfTheFirst:
            rpn = build(kind, redraw, anchor_matcher=OfTheFirst([0.3, 0.6], [0, -1, 1]))
        else:
            rpn = build(type("Overriding", (override, kind), {}), redraw)
        results.append(run(rpn, features(), objects(3, 5)))
    (proposals, losses, _), (expected_proposals, expected, _) = results
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert_near(losses[name], loss, name)
    same_proposals(proposals, expected_proposals)


def test_a_sample_of_many(redraw: Check) -> None:
    """As many of each kind as detectron2 draws, and losses about as large."""
    changes = {"batch_size_per_image": 64, "positive_fraction": 0.5}
    ours, theirs = (build(kind, redraw, **changes) for kind in (MaskRCNNRPN, RPN))
    gt = objects(3, 5)
    sums: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for name, rpn in (("ours", ours), ("theirs", theirs)):
        for seed in range(60):
            torch.manual_seed(seed)
            _, losses, latest = run(copy.deepcopy(rpn), features(), gt, iteration=19)
            numbers = {k: v.item() for k, v in losses.items()}
            numbers |= {k: v for k, (v, _) in latest.items() if k.startswith("rpn/")}
            sums[name].append(numbers)
    assert sums["ours"][0].keys() == sums["theirs"][0].keys()
    for key in sums["theirs"][0]:
        drawn = {k: torch.tensor([n[key] for n in v]).double() for k, v in sums.items()}
        error = (drawn["theirs"].var() / 60 + drawn["ours"].var() / 60).sqrt()
        difference = (drawn["ours"].mean() - drawn["theirs"].mean()).abs()
        assert difference <= 4 * error + 1e-9, key
    assert drawn["theirs"].mean() > 0


def test_statistics_come_when_they_are_written(redraw: Check) -> None:
    rpn = build(MaskRCNNRPN, redraw)
    x, gt = features(), objects(2, 2)
    seen = [i for i in range(41) if "rpn/num_pos_anchors" in run(rpn, x, gt, i)[2]]
    assert seen == [19, 39]
