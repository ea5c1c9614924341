"""Mask targets and mask losses (Sec. 3, Table 2b) as functions of tensors.

A mask branch gives logits for each RoI; which ones depends on the loss:

* sigmoid: one binary mask a class, no competition between classes. L_mask is the average binary
  cross-entropy over the M x M cells of the ground-truth class's mask alone, so only that mask is
  ever asked for: (R, M, M).
* softmax: the classes and background compete for each cell, as in an FCN for semantic
  segmentation: (R, K + 1, M, M), background last.

Class-agnostic masks (K = 1) go with either.
"""

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor


def mask_targets(gt_masks: PolygonMasks | BitMasks, boxes: Tensor, mask_side: int) -> Tensor:
    """What the mask branch should say: the part of each ground-truth mask inside its RoI.

    Args:
        gt_masks: R masks, in image pixels.
        boxes: (R, 4), image pixels.
        mask_side: M.

    Returns:
        bool (R, M, M) on the device of `boxes`: the mask cropped to the box and sampled at M x M.
    """
    return gt_masks.crop_and_resize(boxes, mask_side).to(device=boxes.device)


def sigmoid_mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """L_mask: binary cross-entropy, averaged over RoIs and cells (Sec. 3; Table 2b, sigmoid).

    Args:
        logits: (R, M, M), of each RoI's ground-truth class.
        targets: bool or float (R, M, M).

    Returns:
        Scalar, float32 or wider; 0 with a zero gradient if R = 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and targets {tuple(targets.shape)}: "
            "both must be (R, M, M), the logits being those of the ground-truth class"
        )
    if logits.numel() == 0:
        return logits.sum() * 0
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def softmax_mask_loss(logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """Multinomial cross-entropy over classes and background, a cell at a time (Table 2b, softmax).

    The paper says only "a per-pixel softmax and a multinomial loss"; cells outside the object need
    a label, hence the background channel.

    Args:
        logits: (R, K + 1, M, M), background last.
        targets: bool or float (R, M, M); a cell above 0.5 belongs to the object.
        classes: int64 (R,), ground-truth classes in [0, K).

    Returns:
        Scalar, averaged over RoIs and cells; 0 with a zero gradient if R = 0.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if logits.shape[:1] + logits.shape[2:] != targets.shape or len(classes) != len(logits):
        raise ValueError(
            f"logits are {tuple(logits.shape)}, targets {tuple(targets.shape)} and classes "
            f"{tuple(classes.shape)}: must be (R, K + 1, M, M), (R, M, M) and (R,)"
        )
    if logits.numel() == 0:
        return logits.sum() * 0
    background = logits.shape[1] - 1
    labels = torch.where(targets > 0.5, classes[:, None, None], background)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels)


def softmax_mask_probs(logits: Tensor, classes: Tensor) -> Tensor:
    """The soft mask of each RoI's class under the softmax loss.

    Args:
        logits: (R, K + 1, M, M), background last.
        classes: int64 (R,), predicted classes in [0, K).

    Returns:
        (R, M, M), probability that a cell belongs to the class.
    """
    rows = torch.arange(len(classes), device=classes.device)
    return logits.softmax(dim=1)[rows, classes]
