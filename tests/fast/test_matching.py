"""Matching and sampling of all images at once against detectron2's, image by image."""

from typing import Any

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes
from detectron2.structures import pairwise_iou as their_iou
from torch import Tensor

from benchmark.cuda_rules import CudaRules
from mask_rcnn_plugin.fast import matching
from mask_rcnn_plugin.fast.grouping import padded
from mask_rcnn_plugin.fast.matching import match, pairwise_iou, sample


def boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=generator) * 100
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def test_iou_is_detectron2s_bit_by_bit() -> None:
    some, others = boxes(7, seed=1), boxes(30)
    others[3] = 0  # of no area
    expected = their_iou(Boxes(some), Boxes(others))
    assert expected.max() > 0.3
    assert pairwise_iou(some, others).equal(expected)
    batched = pairwise_iou(torch.stack([some, some + 1]), others[None])
    assert batched[0].equal(expected)
    assert not batched[1].equal(expected)


def test_iou_of_two_halves() -> None:
    iou = pairwise_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))
    assert iou[0].tolist() == pytest.approx([1 / 3])


RPN = ([0.3, 0.5], [0, -1, 1], True)
ROI = ([0.5], [0, 1], False)


@pytest.mark.parametrize("counts", [(4, 1, 6), (3, 0, 2), (0, 0)])
@pytest.mark.parametrize("rule", [RPN, ROI], ids=["rpn", "roi"])
@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("is_shared", [True, False])
def test_matches_are_detectron2s(
    counts: tuple[int, ...],
    rule: tuple[list[float], list[int], bool],
    at_once: int,
    is_shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matching, "ELEMENTS_AT_ONCE", at_once)
    candidates = boxes(1 if is_shared else len(counts), 200)
    gt_boxes = [boxes(n, seed=i + 1) for i, n in enumerate(counts)]
    theirs = Matcher(*rule)
    matches, matched_labels = match(padded(gt_boxes), counts, candidates, theirs)
    assert matched_labels.dtype == torch.int8
    for i, gt in enumerate(gt_boxes):
        iou = their_iou(Boxes(gt), Boxes(candidates[0 if is_shared else i]))
        expected_matches, expected_labels = theirs(iou)
        assert matched_labels[i].equal(expected_labels)
        # What overlaps nothing belongs to none in particular.
        meets = iou.amax(dim=0) > 0 if len(gt) else torch.zeros(200, dtype=torch.bool)
        assert matches[i][meets].equal(expected_matches[meets])
    assert bool((matched_labels == 1).any()) == (sum(counts) > 0)


def test_best_anchors_are_positive_however_low() -> None:
    gt, anchors = (
        torch.tensor([[0.0, 0, 10, 10]]),
        torch.tensor([[[0.0, 0, 1, 1], [50, 50, 60, 60]]]),
    )
    for low_quality, expected in ((True, 1), (False, 0)):
        matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=low_quality)
        assert match(gt[None], [1], anchors, matcher)[1].tolist() == [[expected, 0]]


def test_a_crowd_too_large_for_a_gpu_is_matched_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = padded([boxes(3), boxes(2, seed=1)]), [3, 2], boxes(1, 50, seed=2), Matcher(*RPN)
    expected = match(*given)
    work, calls = matching._match, []

    def full(*args: object) -> tuple[Tensor, Tensor]:
        calls.append(args)
        if len(calls) < 3:  # detectron2 tries once more
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return work(*args)

    monkeypatch.setattr(matching, "_match", full)
    found = match(*given)
    assert len(calls) == 3
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_where_one_part_alone_is_matched_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    given = padded([boxes(3), boxes(2, seed=1)]), [3, 2], boxes(1, 50, seed=2)
    expected = match(*given, Matcher(*RPN))
    work, calls = matching._match, []

    def first_on_the_host(gt: Tensor, counts: Any, candidates: Tensor, matcher: Any) -> Any:
        calls.append(len(gt))
        if len(calls) == 1:
            return work(gt.cpu(), counts, candidates.cpu(), matcher)
        return work(gt, counts, candidates, matcher)

    monkeypatch.setattr(matching, "_match", first_on_the_host)
    monkeypatch.setattr(matching, "ELEMENTS_AT_ONCE", 1)
    with CudaRules():
        gt_boxes, counts, candidates = given
        found = match(gt_boxes.to("cuda"), counts, candidates.to("cuda"), Matcher(*RPN))
        found = tuple(x.cpu() for x in found)
    assert calls == [1, 1]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def labels_of(positives: int, negatives: int, ignored: int) -> Tensor:
    labels = torch.tensor([1] * positives + [0] * negatives + [-1] * ignored)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(
    ("positives", "negatives"), [(5, 60), (30, 60), (30, 3), (0, 60), (5, 0), (2, 3), (0, 0)]
)
def test_as_many_are_sampled_as_by_detectron2(positives: int, negatives: int) -> None:
    labels = labels_of(positives, negatives, ignored=9)
    indices, is_positive, is_there = sample((labels == 1)[None], (labels == 0)[None], 20, 0.5)
    theirs = subsample_labels(labels.clone(), 20, 0.5, 0)
    indices, is_positive, is_there = indices[0], is_positive[0], is_there[0]
    num_positive, num_negative = (len(x) for x in theirs)
    assert is_positive.tolist() == [i < num_positive for i in range(len(indices))]
    assert is_there.tolist() == [i < num_positive + num_negative for i in range(len(indices))]
    assert labels[indices[is_positive]].tolist() == [1] * num_positive
    assert labels[indices[is_there & ~is_positive]].tolist() == [0] * num_negative
    chosen = indices[is_there].tolist()
    assert len(set(chosen)) == len(chosen)


def test_every_candidate_is_as_likely() -> None:
    labels = labels_of(12, 30, ignored=5)
    draws = 4000
    indices, _, is_there = sample(
        (labels == 1).expand(draws, -1), (labels == 0).expand(draws, -1), 16, 0.25
    )
    share = torch.zeros(draws, len(labels)).scatter_add_(1, indices, is_there.float()).mean(dim=0)
    for label, expected in ((1, 4 / 12), (0, 12 / 30), (-1, 0.0)):
        # Five standard deviations of the mean.
        allowed = 5 * (expected * (1 - expected) / draws) ** 0.5
        assert (share[labels == label] - expected).abs().max() <= allowed
    # Neighbours are not chosen together more often than others: of 12 positives 4 are.
    both = torch.zeros(draws, len(labels)).scatter_add_(1, indices, is_there.float())
    a, b = (labels == 1).nonzero()[:2, 0].tolist()
    together = float((both[:, a] * both[:, b]).mean())
    assert together == pytest.approx(4 / 12 * 3 / 11, abs=0.025)


def test_images_draw_for_themselves() -> None:
    labels = labels_of(12, 30, ignored=0).expand(2, -1)
    indices = sample(labels == 1, labels == 0, 16, 0.25)[0]
    assert not indices[0].equal(indices[1])
