"""The sampling of proposals against detectron2's own."""

import copy

import numpy as np
import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor

from mask_rcnn_plugin.modeling.proposal_sampling import ProposalSampling, foreground

K = 5
SIZE = (80, 120)


def heads(
    kind: type[ROIHeads],
    num: int,
    fraction: float = 0.25,
    append: bool = True,
    matcher: Matcher | None = None,
) -> ROIHeads:
    return kind(
        num_classes=K,
        batch_size_per_image=num,
        positive_fraction=fraction,
        proposal_matcher=matcher or Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        proposal_append_gt=append,
    )


def objects(n: int, masks: str = "polygon", seed: int = 0) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 10 + torch.rand(n, 2, generator=generator) * 10], dim=1)
    target = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.arange(n) % K)
    if masks == "polygon":
        target.gt_masks = PolygonMasks([[np.tile(box.numpy(), 2)] for box in boxes])
    else:
        target.gt_masks = BitMasks(torch.rand(n, *SIZE, generator=generator) > 0.5)
    target.gt_keypoints = Keypoints(torch.rand(n, 3, 3, generator=generator))
    return target


def proposals_of(target: Instances, near: int, far: int) -> Instances:
    generator = torch.Generator().manual_seed(7)
    boxes = target.gt_boxes.tensor.repeat(near, 1)
    boxes = boxes + torch.randn(boxes.shape, generator=generator)
    corners = torch.rand(far, 2, generator=generator) * 60
    boxes = torch.cat([boxes, torch.cat([corners, corners + 2], dim=1)])
    return Instances(
        SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.arange(len(boxes)) / 10
    )


def sampled(roi_heads: ROIHeads, near: int, far: int, *targets: Instances):  # type: ignore[no-untyped-def]
    proposals = [proposals_of(t, near, far) for t in targets]
    with EventStorage() as storage:
        result = roi_heads.label_and_sample_proposals(proposals, copy.deepcopy(list(targets)))
    return result, {name: value for name, (value, _) in storage.latest().items()}


def by_box(of_image: Instances) -> dict[tuple[float, ...], tuple[object, ...]]:
    """What is known of each proposal; of the background only that it is."""
    known = {}
    for i, box in enumerate(of_image.proposal_boxes.tensor.tolist()):
        label = int(of_image.gt_classes[i])
        more: tuple[object, ...] = ()
        if label < K:
            masks = of_image.gt_masks
            mask = (
                np.concatenate(masks.polygons[i]).tolist()
                if isinstance(masks, PolygonMasks)
                else masks.tensor[i].tolist()
            )
            keypoints = of_image.gt_keypoints.tensor[i].tolist()
            more = (of_image.gt_boxes.tensor[i].tolist(), mask, keypoints)
        known[tuple(box)] = (label, float(of_image.objectness_logits[i]), *more)
    return known


@pytest.mark.parametrize("masks", ["polygon", "bitmap"])
@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_a_sample_of_all_is_detectron2s(counts: tuple[int, int], append: bool, masks: str) -> None:
    targets = [objects(n, masks, seed=i) for i, n in enumerate(counts)]
    ours, statistics = sampled(heads(ProposalSampling, 500, 1.0, append), 4, 9, *targets)
    theirs, expected = sampled(heads(ROIHeads, 500, 1.0, append), 4, 9, *targets)
    assert statistics == expected
    for i, j in zip(ours, theirs, strict=True):
        assert i.get_fields().keys() == j.get_fields().keys()
        assert by_box(i) == by_box(j)
        assert len(i) == len(j)
    (positives, rows), (expected, _) = foreground(ours, K), select_foreground_proposals([*ours], K)
    for of_image, its_rows, i, j in zip(ours, rows, positives, expected, strict=True):
        assert by_box(of_image[its_rows]) == by_box(i) == by_box(j)
        assert len(i) == len(j)


class OfTheFirst(Matcher):
    def __call__(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        matches, labels = super().__call__(quality)
        return matches.zero_(), labels


@pytest.mark.parametrize("kind", [Matcher, OfTheFirst])
def test_what_is_ignored_is_detectron2s(kind: type[Matcher]) -> None:
    """As background only what meets an object a little (Fast R-CNN), and an object of no class."""
    matcher = kind([0.1, 0.5], [-1, 0, 1])
    targets = [objects(4), objects(0), objects(1)]
    targets[0].gt_classes[1] = -1
    ours, theirs = (
        sampled(heads(k, 500, 1.0, False, matcher), 4, 9, *targets)
        for k in (ProposalSampling, ROIHeads)
    )
    assert ours[1] == theirs[1]
    assert [by_box(i) for i in ours[0]] == [by_box(j) for j in theirs[0]]
    assert 0 < len(theirs[0][0]) < 25
    assert len(theirs[0][1]) == 9


def test_a_sampling_of_ones_own() -> None:
    class Last:
        def _sample_proposals(self, matches, labels, gt_classes):  # type: ignore[no-untyped-def]
            last = torch.tensor([len(matches) - 1, len(matches) - 2])
            return last, torch.tensor([K, 0])

    ours, theirs = (
        sampled(heads(type("Own", (Last, kind), {}), 9), 2, 9, objects(2))
        for kind in (ProposalSampling, ROIHeads)
    )
    assert ours[1] == theirs[1]
    assert by_box(ours[0][0]) == by_box(theirs[0][0])
    assert len(ours[0][0]) == 2


@pytest.mark.parametrize(("near", "far"), [(8, 40), (20, 2), (1, 3)])
def test_numbers_are_detectron2s(near: int, far: int) -> None:
    targets = [objects(4), objects(0), objects(1)]
    ours, statistics = sampled(heads(ProposalSampling, 32), near, far, *targets)
    theirs, expected = sampled(heads(ROIHeads, 32), near, far, *targets)
    assert statistics == expected
    for i, j in zip(ours, theirs, strict=True):
        assert len(i) == len(j)
        assert i.gt_classes.dtype == j.gt_classes.dtype
        labels = (i.gt_classes < K).tolist()
        assert labels == sorted(labels, reverse=True)  # positives first
        assert sum(labels) == int((j.gt_classes < K).sum())


def test_foreground_of_any_list_is_detectron2s() -> None:
    theirs, _ = sampled(heads(ROIHeads, 32), 8, 9, objects(4), objects(2))
    numbers = [int((p.gt_classes < K).sum()) for p in theirs]
    assert [len(p) for p in foreground(theirs, K)[0]] == numbers
