"""Boxes to ground truth, and the random sample that is trained on, for all images at once.

As detectron2's `pairwise_iou`, `Matcher` and `subsample_labels`, whose results have as many rows as
there happen to be. These have fixed shapes, so that the host need not wait for the device to learn
how many: images with less ground truth are padded with empty boxes, and what is not sampled is
marked.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

logger = logging.getLogger(__name__)

# Of the matrix of a few images at a time: 256 MB in float32.
ELEMENTS_AT_ONCE = 2**26


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of all pairs, in detectron2's order of operations.

    Args:
        boxes: float32 (..., G, 4), XYXY.
        others: float32 (..., A, 4).

    Returns:
        (..., G, A); 0 for pairs that don't overlap.
    """
    boxes, others = boxes[..., :, None, :], others[..., None, :, :]
    sides = torch.minimum(boxes[..., 2:], others[..., 2:])
    sides = sides.sub_(torch.maximum(boxes[..., :2], others[..., :2])).clamp_(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    union = (_area(boxes) + _area(others)).sub_(intersection)
    # An intersection of 0 beside an area of 0 is 0 / 0.
    return torch.where(intersection > 0, intersection / union, 0.0)


def _area(boxes: Tensor) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]


def match(
    gt_boxes: Sequence[Tensor],
    boxes: Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    """As detectron2's `Matcher`, for all images.

    Args:
        gt_boxes: float32 (its G, 4) for each of N images; G may be 0.
        boxes: float32 (N, A, 4), or (1, A, 4) where the images have the same.
        thresholds: ascending IoUs, T of them.
        labels: T + 1: of a box below the first threshold, between the first two, ...
        allow_low_quality_matches: each ground truth's best boxes are labelled 1 too.

    Returns:
        int64 (N, A): the ground truth each box overlaps most with, within its image; 0 if none.
        int8 (N, A): labels.
    """
    rule = thresholds, labels, allow_low_quality_matches
    try:
        return _match(gt_boxes, boxes, *rule)
    except torch.OutOfMemoryError:  # of a crowd; as detectron2, on the host then
        logger.warning(
            "Out of GPU memory: %s objects are matched on the CPU", list(map(len, gt_boxes))
        )
        found = _match([gt.cpu() for gt in gt_boxes], boxes.cpu(), *rule)
        return found[0].to(boxes.device), found[1].to(boxes.device)


def _match(
    gt_boxes: Sequence[Tensor],
    boxes: Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    counts = [len(gt) for gt in gt_boxes]
    most = max(*counts, 1)
    padded = pad_sequence([*gt_boxes, boxes.new_zeros(most, 4)], batch_first=True)[:-1]
    step = max(1, ELEMENTS_AT_ONCE // max(1, most * boxes.shape[1]))
    matches, quality, best = [], [], []
    for n in range(0, len(counts), step):
        iou = pairwise_iou(padded[n : n + step], boxes[n : n + step] if len(boxes) > 1 else boxes)
        values, indices = iou.max(dim=1)
        matches.append(indices)
        quality.append(values)
        if allow_low_quality_matches:
            highest = iou.amax(dim=2, keepdim=True)
            # No box is best for what is padded.
            for image, count in enumerate(counts[n : n + step]):
                if count < most:
                    highest[image, count:] = torch.inf
            best.append((iou == highest).any(dim=1))
    overlaps = _cat(quality)
    matched_labels = torch.full_like(overlaps, labels[0], dtype=torch.int8)
    for threshold, label in zip(thresholds, labels[1:], strict=True):
        matched_labels.masked_fill_(overlaps >= threshold, label)
    if allow_low_quality_matches:
        matched_labels.masked_fill_(_cat(best), 1)
    return _cat(matches), matched_labels


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def sample(
    positive: Tensor, negative: Tensor, num_samples: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As detectron2's `subsample_labels`: random positives, up to a fraction, then negatives.

    Args:
        positive, negative: bool (N, A), of each image's candidates.
        num_samples: S, wanted of each image.
        positive_fraction: most that may be positive.

    Returns:
        int64 (N, min(S, A)): candidates, positives first.
        bool, the same shape: whether it is a positive.
        bool, the same shape: whether there is such a candidate; those without come last.
    """
    # Random numbers are in [0, 1). A candidate that is chosen at the end is one of the highest.
    key = torch.rand(positive.shape, device=positive.device)
    num_positive = min(int(num_samples * positive_fraction), positive.shape[1])
    highest, indices = key.where(positive, -1.0).topk(num_positive, dim=1)
    key = key.where(negative, -1.0)
    key.scatter_(1, indices, torch.where(highest >= 0, highest + 1, key.gather(1, indices)))
    highest, indices = key.topk(min(num_samples, key.shape[1]), dim=1)
    return indices, highest >= 1, highest >= 0
