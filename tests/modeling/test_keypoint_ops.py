"""Keypoint encoding and loss by hand."""

import math

import pytest
import torch

from mask_rcnn_plugin.modeling.keypoint_ops import (
    encode_keypoints,
    keypoint_loss,
)


def encode_one(x: float, y: float, visibility: int = 2) -> tuple[int, bool]:
    """In a box of 56 x 28 px at (10, 20), cells of 1 x 1/2 px."""
    cells, has_target = encode_keypoints(
        torch.tensor([[[x, y, visibility]]]), torch.tensor([[10.0, 20, 66, 48]]), 56
    )
    assert cells.dtype == torch.int64
    assert has_target.dtype == torch.bool
    return cells.item(), has_target.item()


@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [
        (10, 20, 0, 0),  # upper left corner
        (10.99, 20.49, 0, 0),
        (11, 20.5, 1, 1),  # a cell holds its upper left border
        (38, 34, 28, 28),
        (65.9, 47.9, 55, 55),
        (66, 48, 55, 55),  # the right and the lower border belong to the last cell
        (66, 20, 0, 55),
        (10, 48, 55, 0),
    ],
)
def test_cell_of_a_keypoint(x: float, y: float, row: int, column: int) -> None:
    assert encode_one(x, y) == (row * 56 + column, True)


@pytest.mark.parametrize(("x", "y"), [(9.9, 30), (66.1, 30), (30, 19.9), (30, 48.1), (0, 0)])
def test_keypoint_outside_its_roi_has_no_target(x: float, y: float) -> None:
    assert encode_one(x, y) == (0, False)


@pytest.mark.parametrize(("visibility", "labelled"), [(0, False), (1, True), (2, True)])
def test_hidden_keypoints_count_and_unlabelled_do_not(visibility: int, labelled: bool) -> None:
    assert encode_one(38, 34, visibility) == ((28 * 56 + 28) * labelled, labelled)


def test_each_roi_has_its_own_frame() -> None:
    points = torch.tensor([[[5.0, 5, 2], [0, 0, 2]]]).expand(2, 2, 3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 8, 40]])
    cells, has_target = encode_keypoints(points, boxes, 4)
    assert cells.tolist() == [[2 * 4 + 2, 0], [0 * 4 + 1, 0]]
    assert has_target.tolist() == [[True, True], [True, False]]


def test_encoding_no_roi() -> None:
    cells, has_target = encode_keypoints(torch.zeros(0, 17, 3), torch.zeros(0, 4), 56)
    assert cells.shape == has_target.shape == (0, 17)
    assert cells.dtype == torch.int64


# Two RoIs, two keypoint types, 2 x 2 heatmaps.
LOGITS = [
    [[[9.0, -1.0], [0.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]],
    [[[-4.0, 6.0], [5.0, 1.0]], [[7.0, 0.0], [-3.0, 8.0]]],
]
CELLS = [[1, 3], [2, 0]]
HAS_TARGET = [[True, True], [False, True]]


def cross_entropy(target: float, *logits: float) -> float:
    return math.log(sum(math.exp(x) for x in logits)) - target


LOSSES = [
    cross_entropy(-1, 9, -1, 0, 3),
    cross_entropy(2, 2, 2, 2, 2),
    cross_entropy(7, 7, 0, -3, 8),
]


@pytest.mark.parametrize(("normalizer", "divisor"), [(None, 3), (8.0, 8)])
def test_loss_by_hand(normalizer: float | None, divisor: float) -> None:
    loss = keypoint_loss(
        torch.tensor(LOGITS), torch.tensor(CELLS), torch.tensor(HAS_TARGET), normalizer
    )
    assert loss.item() == pytest.approx(sum(LOSSES) / divisor, rel=1e-6)
    assert sum(LOSSES) > 10


def test_gradient_reaches_the_keypoints_with_a_target_only() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    keypoint_loss(logits, torch.tensor(CELLS), torch.tensor(HAS_TARGET)).backward()
    expected = torch.tensor(LOGITS).flatten(2).softmax(2)
    expected.scatter_add_(2, torch.tensor(CELLS)[..., None], torch.full((2, 2, 1), -1.0))
    expected *= torch.tensor(HAS_TARGET)[..., None] / 3
    torch.testing.assert_close(logits.grad.flatten(2), expected)


def test_loss_in_bfloat16_is_computed_in_float32() -> None:
    loss = keypoint_loss(
        torch.tensor(LOGITS, dtype=torch.bfloat16), torch.tensor(CELLS), torch.tensor(HAS_TARGET)
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(LOSSES) / 3, rel=1e-6)


def test_loss_in_float64_stays_there() -> None:
    loss = keypoint_loss(
        torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(CELLS), torch.tensor(HAS_TARGET)
    )
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("normalizer", [None, 8.0])
@pytest.mark.parametrize("rois", [0, 2])
def test_loss_without_targets(rois: int, normalizer: float | None) -> None:
    weight = torch.randn(3, requires_grad=True)
    logits = torch.ones(rois, 3, 4, 4) * weight[:, None, None]
    none = torch.zeros(rois, 3, dtype=torch.bool)
    loss = keypoint_loss(logits, none.long(), none, normalizer)
    assert loss.item() == 0
    loss.backward()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize(
    ("cells", "has_target"), [((2, 3), (2, 2)), ((2, 2), (1, 2)), ((4,), (4,))]
)
def test_loss_refuses_other_shapes(cells: tuple[int, ...], has_target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(R, K, M, M\), \(R, K\) and \(R, K\)"):
        keypoint_loss(
            torch.tensor(LOGITS),
            torch.zeros(cells, dtype=torch.int64),
            torch.zeros(has_target, dtype=torch.bool),
        )
