"""Keypoint targets and loss (Sec. 5) as functions of tensors.

A keypoint type is a one-hot M x M mask of the RoI: the branch gives logits over the M^2 cells, the
K types independently of each other.
"""

import torch
import torch.nn.functional as F
from detectron2.structures import Keypoints
from torch import Tensor


def encode_keypoints(keypoints: Tensor, boxes: Tensor, heatmap_side: int) -> tuple[Tensor, Tensor]:
    """The cell of its RoI in which each keypoint lies.

    Args:
        keypoints: float (R, K, 3): x, y in image pixels (continuous) and visibility, 0 for not
            labelled, 1 for labelled but hidden, 2 for visible.
        boxes: (R, 4), image pixels.
        heatmap_side: M.

    Returns:
        cells: int64 (R, K), row * M + column; 0 where there is no target.
        has_target: bool (R, K), whether the keypoint is labelled and inside its RoI.
    """
    cells, has_target = Keypoints(keypoints).to_heatmap(boxes, heatmap_side)
    shape = keypoints.shape[:2]  # detectron2 flattens it if R = 0
    return cells.view(shape), has_target.view(shape) > 0


def keypoint_loss(
    logits: Tensor, cells: Tensor, has_target: Tensor, normalizer: float | None = None
) -> Tensor:
    """Cross-entropy over an M^2-way softmax for each labelled keypoint (Sec. 5).

    Args:
        logits: (R, K, M, M).
        cells: int64 (R, K), target cells.
        has_target: bool (R, K); the other keypoints take no part.
        normalizer: what the sum is divided by; the number of targets if None.

    Returns:
        Scalar, float32 or wider; 0 with a zero gradient if there is no target.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if not logits.shape[:2] == cells.shape == has_target.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, cells {tuple(cells.shape)} and has_target "
            f"{tuple(has_target.shape)}: must be (R, K, M, M), (R, K) and (R, K)"
        )
    num_targets = int(has_target.sum())
    if num_targets == 0:
        return logits.sum() * 0
    picked = logits.flatten(2)[has_target]
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    loss = F.cross_entropy(picked, cells[has_target], reduction="sum")
    return loss / (num_targets if normalizer is None else normalizer)
