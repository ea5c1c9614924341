"""Mask targets and mask losses (Sec. 3, Table 2b) as functions of tensors.

A mask branch gives logits for each RoI; which ones depends on the loss:

* sigmoid: one binary mask a class, no competition between classes. L_mask is the average binary
  cross-entropy over the M x M cells of the ground-truth class's mask alone, so only that mask is
  ever asked for: (R, M, M).
* softmax: the classes and background compete for each cell, as in an FCN for semantic
  segmentation: (R, K + 1, M, M), background last.

Class-agnostic masks (K = 1) go with either.
"""

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, PolygonMasks
from pycocotools import mask as coco_mask
from torch import Tensor

# Bitmaps are made floats for RoIAlign, so many at a time: 27 MB in float32 at 800 x 1088.
BITMAPS_AT_ONCE = 8


def mask_targets(gt_masks: PolygonMasks | BitMasks, boxes: Tensor, mask_side: int) -> Tensor:
    """What the mask branch should say: the part of each ground-truth mask inside its RoI.

    Args:
        gt_masks: R masks, in image pixels.
        boxes: (R, 4), image pixels.
        mask_side: M.

    Returns:
        bool (R, M, M) on the device of `boxes`: the mask cropped to the box and sampled at M x M;
        what detectron2's `crop_and_resize` gives.

    Raises:
        ValueError: if there isn't one box a mask.
    """
    if len(gt_masks) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes for {len(gt_masks)} gt_masks: must be as many")
    if isinstance(gt_masks, PolygonMasks):
        corners = boxes.detach().cpu().numpy()
        return _rasterize(gt_masks.polygons, corners, mask_side).to(boxes.device)
    targets = [
        BitMasks(masks).crop_and_resize(part, mask_side)
        for masks, part in zip(gt_masks.tensor.split(BITMAPS_AT_ONCE), boxes.split(BITMAPS_AT_ONCE))
    ]
    return torch.cat(targets).to(boxes.device)


def _rasterize(polygons: list[list[np.ndarray]], boxes: np.ndarray, side: int) -> Tensor:
    """The insides of R masks of any number of polygons, float64 (x0, y0, x1, y1, ...), in their
    boxes, float32 (R, 4), at M x M: bool (R, M, M). One call of pycocotools for all polygons."""
    owners, parts = [], []
    for r, (mask, box) in enumerate(zip(polygons, boxes)):
        width, height = box[2:] - box[:2]
        # detectron2's smallest side; scalars, since an array would round 0.1 to float32.
        scale = np.array([side / max(width, 0.1), side / max(height, 0.1)])
        for polygon in mask:
            owners.append(r)
            parts.append(((polygon.reshape(-1, 2) - box[:2]) * scale).ravel())
    targets = torch.zeros(len(boxes), side, side, dtype=torch.int32)
    if parts:  # pycocotools takes no empty list
        insides = coco_mask.decode(coco_mask.frPyObjects(parts, side, side))  # (M, M, parts)
        insides = torch.from_numpy(insides).permute(2, 0, 1).int()
        targets.index_add_(0, torch.tensor(owners), insides)
    return targets > 0


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
