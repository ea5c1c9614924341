"""Box deltas and their losses against detectron2's."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from torch import Tensor

from mask_rcnn_plugin.fast.box_regression import box_deltas, box_regression_loss

LOSSES = [("smooth_l1", 0.0), ("smooth_l1", 0.5), ("giou", 0.0), ("diou", 0.0), ("ciou", 0.0)]


def boxes(n: int, seed: int) -> Tensor:
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat([corners.amin(1), corners.amax(1) + 2], dim=1)


def test_deltas_are_detectron2s() -> None:
    weights = (10.0, 9.0, 5.0, 4.0)
    some, targets = boxes(50, 0), boxes(50, 1)
    expected = Box2BoxTransform(weights).get_deltas(some, targets)
    assert torch.allclose(box_deltas(some, targets, weights), expected, rtol=1e-5, atol=1e-5)


def test_deltas_by_hand() -> None:
    box, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 15, 40]])
    deltas = box_deltas(box, target, (1.0, 1.0, 2.0, 2.0))
    assert deltas[0].tolist() == pytest.approx([0.5, 0.5, 0.0, 2 * math.log(2)])


@pytest.mark.parametrize(("loss_type", "beta"), LOSSES)
def test_losses_and_gradients_are_detectron2s(loss_type: str, beta: float) -> None:
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    some, targets = boxes(40, 0), boxes(40, 1)
    counted = torch.rand(40) > 0.6
    ours = torch.randn(40, 4).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = box_regression_loss(ours, some, targets, counted, transform, loss_type, beta)
    expected = _dense_box_regression_loss(
        [some], transform, [theirs[None]], [targets], counted[None], loss_type, beta
    )
    assert expected > 1
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss_type", "beta"), LOSSES)
def test_what_is_not_counted_may_be_anything(loss_type: str, beta: float) -> None:
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    some, targets = boxes(4, 0), boxes(4, 1)
    deltas = torch.randn(4, 4)
    some[2] = 0  # of no size
    targets[1], deltas[3] = math.nan, math.inf
    counted = torch.tensor([True, False, False, False])
    deltas.requires_grad_()
    loss = box_regression_loss(deltas, some, targets, counted, transform, loss_type, beta)
    assert loss.isfinite()
    loss.backward()
    assert deltas.grad[0].abs().max() > 0
    assert deltas.grad[1:].tolist() == [[0.0] * 4] * 3


def test_none_at_all() -> None:
    deltas = torch.randn(0, 4, requires_grad=True)
    none = torch.zeros(0, 4)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    loss = box_regression_loss(
        deltas, none, none, torch.zeros(0, dtype=torch.bool), transform, "smooth_l1", 1.0
    )
    assert loss == 0


def test_an_unknown_loss_is_named() -> None:
    given, transform = boxes(2, 0), Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    counted = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'l3'.*smooth_l1.*giou"):
        box_regression_loss(given, given, given, counted, transform, "l3", 0.0)


def test_a_transform_of_ones_own_is_asked() -> None:
    class Difference:
        def get_deltas(self, boxes: Tensor, targets: Tensor) -> Tensor:
            return targets - boxes

    some, targets = boxes(5, 0), boxes(5, 1)
    counted = torch.ones(5, dtype=torch.bool)
    deltas = targets - some
    loss = box_regression_loss(deltas, some, targets, counted, Difference(), "smooth_l1", 0.0)
    assert loss == 0
