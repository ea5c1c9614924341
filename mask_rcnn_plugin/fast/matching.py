"""Boxes to ground truth, and the random sample that is trained on, for all images at once.

As detectron2's `pairwise_iou`, `Matcher` and `subsample_labels`, whose results have as many rows as
there happen to be. These have fixed shapes, so that the host need not wait for the device to learn
how many: images with less ground truth are padded with empty boxes, and what is not sampled is
marked.
"""

from collections.abc import Sequence

import torch
from detectron2.layers import cat
from detectron2.modeling.matcher import Matcher
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor

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
    gt_boxes: Tensor, counts: Sequence[int], boxes: Tensor, matcher: Matcher
) -> tuple[Tensor, Tensor]:
    """As detectron2's `Matcher`, for all images.

    Args:
        gt_boxes: float32 (N, G, 4), of N images.
        counts: how many ground truths each image has; the others are padding.
        boxes: float32 (N, A, 4), or (1, A, 4) where the images have the same.
        matcher: its thresholds and labels count.

    Returns:
        int64 (N, A): the ground truth each box overlaps most with, within its image; 0 if none.
        int8 (N, A): labels.
    """
    step = max(1, ELEMENTS_AT_ONCE // max(1, gt_boxes.shape[1] * boxes.shape[1]))
    parts = []
    for n in range(0, len(gt_boxes), step):
        some = slice(n, n + step)
        candidates = boxes[some] if len(boxes) > 1 else boxes
        # On the host, as detectron2 does it, where a crowd is too large for the GPU's memory.
        parts.append(retry_if_cuda_oom(_match)(gt_boxes[some], counts[some], candidates, matcher))
    matches, labels = (cat([part.to(boxes.device) for part in x]) for x in zip(*parts))
    return matches, labels


def _match(
    gt_boxes: Tensor, counts: Sequence[int], boxes: Tensor, matcher: Matcher
) -> tuple[Tensor, Tensor]:
    iou = pairwise_iou(gt_boxes, boxes)
    overlaps, matches = iou.max(dim=1)
    labels = torch.full_like(overlaps, matcher.labels[0], dtype=torch.int8)
    for threshold, label in zip(matcher.thresholds[1:], matcher.labels[1:]):
        labels.masked_fill_(overlaps >= threshold, label)
    if matcher.allow_low_quality_matches:
        highest = iou.amax(dim=2, keepdim=True)
        for of_image, count in zip(highest, counts):
            if count < len(of_image):  # no box is best for what is padded
                of_image[count:] = torch.inf
        labels.masked_fill_((iou == highest).any(dim=1), 1)
    return matches, labels


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
