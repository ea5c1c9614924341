"""Mask targets, and two ways to make masks of a branch's maps (Sec. 3, Table 2b).

The paper's masks are independent of each other: every class has a binary mask, and L_mask looks at
that of the ground-truth class alone. Table 2b compares them with multinomial masks, whose classes
compete for each cell, as in an FCN for semantic segmentation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, PolygonMasks
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from mask_rcnn_plugin.modeling.choices import MASK_LOSS_REGISTRY, chosen

# Bitmaps are made floats for RoIAlign, so many at a time: 27 MB in float32 at 800 x 1088.
BITMAPS_AT_ONCE = 8


class IndependentMasks(nn.Module):
    """A binary mask for each class: sigmoid and binary cross-entropy (Table 2b, sigmoid).

    The last layer of a mask head, from maps to binary logits, which these maps are already.
    """

    def num_maps(self, num_classes: int) -> int:
        """How many maps the layers before have to give."""
        return num_classes

    def maps(self, head: Any, features: Tensor, classes: Tensor) -> Tensor:
        """The maps that L_mask and the masks depend on: (R, 1, M, M), each RoI's class's alone."""
        return head.class_maps(features, classes)[:, None]

    def forward(self, maps: Tensor) -> Tensor:
        """(R, K or 1, M, M), binary logits as they are."""
        return maps

    def loss(self, maps: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
        """L_mask (Sec. 3): binary cross-entropy, averaged over RoIs and cells.

        Args:
            maps: (R, 1, M, M), logits of each RoI's ground-truth class.
            targets: bool or float (R, M, M).
            classes: int64 (R,); the maps are theirs already.

        Returns:
            Scalar, float32 or wider; 0 with a zero gradient if R = 0.

        Raises:
            ValueError: if the shapes don't fit each other.
        """
        if maps.shape[1:2] != (1,) or maps[:, 0].shape != targets.shape:
            raise ValueError(
                f"maps are {tuple(maps.shape)} and targets {tuple(targets.shape)}: must be "
                "(R, 1, M, M), of the ground-truth classes, and (R, M, M)"
            )
        if maps.numel() == 0:
            return maps.sum() * 0
        logits = _in_float32(maps)[:, 0]
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


class MultinomialMasks(nn.Module):
    """Classes and background compete for each cell: softmax and cross-entropy (Table 2b, softmax).

    The paper says only "a per-pixel softmax and a multinomial loss"; cells outside the object need
    a label, hence the map of background, which is the last.

    The last layer of a mask head, from maps to binary logits.
    """

    def num_maps(self, num_classes: int) -> int:
        """How many maps the layers before have to give."""
        return num_classes + 1

    def maps(self, head: Any, features: Tensor, classes: Tensor) -> Tensor:
        """The maps that L_mask and the masks depend on: all of them, (R, K + 1, M, M)."""
        return head.all_maps(features)

    def forward(self, maps: Tensor) -> Tensor:
        """(R, K + 1, M, M) -> (R, K, M, M), logits whose sigmoid is the class's probability."""
        return _in_float32(maps).softmax(dim=1)[:, :-1].logit()

    def loss(self, maps: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy over classes and background, averaged over RoIs and cells.

        Args:
            maps: (R, K + 1, M, M), logits, background last.
            targets: bool or float (R, M, M); a cell above 0.5 belongs to the object.
            classes: int64 (R,), ground-truth classes in [0, K).

        Returns:
            Scalar, float32 or wider; 0 with a zero gradient if R = 0.

        Raises:
            ValueError: if the shapes don't fit each other.
        """
        if maps.shape[:1] + maps.shape[2:] != targets.shape or len(classes) != len(maps):
            raise ValueError(
                f"maps are {tuple(maps.shape)}, targets {tuple(targets.shape)} and classes "
                f"{tuple(classes.shape)}: must be (R, K + 1, M, M), (R, M, M) and (R,)"
            )
        if maps.numel() == 0:
            return maps.sum() * 0
        background = maps.shape[1] - 1
        labels = torch.where(targets > 0.5, classes[:, None, None], background)
        return F.cross_entropy(_in_float32(maps), labels)


LOSS_TYPES: dict[str, Callable[..., Any]] = {
    "sigmoid": IndependentMasks,
    "softmax": MultinomialMasks,
}


def find_masks(loss_type: str | Callable[..., Any]) -> Callable[..., Any]:
    """What makes the last layer of a mask head.

    Args:
        loss_type: a name of `LOSS_TYPES` or in `MASK_LOSS_REGISTRY`, a class's full name, or the
            class, made without arguments: a module with the methods of `IndependentMasks`.

    Raises:
        ValueError: on any other.
    """
    return chosen("loss_type", loss_type, LOSS_TYPES, MASK_LOSS_REGISTRY)


def _in_float32(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mask_targets(
    gt_masks: Sequence[PolygonMasks | BitMasks], boxes: Sequence[Tensor], mask_side: int
) -> Tensor:
    """What the mask branch should say: the part of each ground-truth mask inside its RoI.

    Args:
        gt_masks: for each image, the mask of each of its RoIs, in image pixels.
        boxes: for each image, its RoIs: (its R, 4), image pixels.
        mask_side: M.

    Returns:
        bool (R, M, M) on the device of `boxes`: the mask cropped to the box and sampled at M x M;
        what detectron2's `crop_and_resize` gives.

    Raises:
        ValueError: if there isn't one box for each mask.
    """
    counts = [len(masks) for masks in gt_masks], [len(b) for b in boxes]
    if counts[0] != counts[1]:
        raise ValueError(f"{counts[1]} boxes for {counts[0]} gt_masks: must be equal in each image")
    rois = torch.cat(list(boxes))
    # Once a batch: every copy from a GPU waits for all that it has to do.
    on_host = rois.detach().cpu() if any(isinstance(m, PolygonMasks) for m in gt_masks) else rois
    targets = []
    for masks, of_image, corners in zip(gt_masks, boxes, on_host.split(counts[1])):
        if isinstance(masks, PolygonMasks):
            targets.append(_rasterize(masks.polygons, corners.numpy(), mask_side))
            continue
        parts = (x.split(BITMAPS_AT_ONCE) for x in (masks.tensor, of_image))
        targets += [BitMasks(m).crop_and_resize(few, mask_side) for m, few in zip(*parts)]
    # Those of polygons are on the host: one copy for all images.
    return torch.cat([t.to(targets[0].device) for t in targets]).to(rois.device)


def _rasterize(polygons: list[list[np.ndarray]], boxes: np.ndarray, side: int) -> Tensor:
    """The insides of R masks of any number of polygons, float64 (x0, y0, x1, y1, ...), in their
    boxes, float32 (R, 4), at M x M: bool (R, M, M). One call of pycocotools for all of them."""
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
