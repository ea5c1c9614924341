"""Box deltas and their loss without detectron2's checks of each box, which wait for the device."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "giou": giou_loss,
    "diou": diou_loss,
    "ciou": ciou_loss,
}


def box_deltas(boxes: Tensor, targets: Tensor, weights: tuple[float, ...]) -> Tensor:
    """What `Box2BoxTransform.get_deltas` gives: (R, 4) boxes to (R, 4) targets, as (R, 4)."""
    sizes, target_sizes = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shifts = (targets[:, :2] + 0.5 * target_sizes) - (boxes[:, :2] + 0.5 * sizes)
    dx, dy = (shifts / sizes).unbind(dim=1)
    dw, dh = (target_sizes / sizes).log().unbind(dim=1)
    wx, wy, ww, wh = weights
    return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=1)


def box_regression_loss(
    deltas: Tensor,
    boxes: Tensor,
    targets: Tensor,
    counted: Tensor,
    transform: Any,
    loss_type: str,
    beta: float,
) -> Tensor:
    """The sum of the losses of the boxes that are counted.

    Args:
        deltas: (R, 4), predicted.
        boxes: (R, 4), XYXY, that they start from.
        targets: (R, 4), ground truth.
        counted: bool (R,); what the others are does not matter.
        transform: a `Box2BoxTransform`.
        loss_type: "smooth_l1", with `beta`, "giou", "diou" or "ciou".

    Raises:
        ValueError: on another loss type.
    """
    # Chosen before, not multiplied by 0 after: what is not a number would stay so.
    counted = counted[:, None]
    deltas = deltas.where(counted, 0.0)
    if loss_type == "smooth_l1":
        if type(transform) is Box2BoxTransform:
            wanted = box_deltas(boxes, targets, transform.weights)
        else:
            wanted = transform.get_deltas(boxes, targets)
        return smooth_l1_loss(deltas, wanted.where(counted, 0.0), beta=beta, reduction="sum")
    if loss_type not in _LOSSES:
        raise ValueError(
            f"box_reg_loss_type is {loss_type!r}, must be one of {['smooth_l1', *_LOSSES]}"
        )
    predicted = transform.apply_deltas(deltas, boxes)
    losses = _LOSSES[loss_type](predicted, targets.where(counted, boxes), reduction="none")
    return losses.where(counted[:, 0], 0.0).sum()
