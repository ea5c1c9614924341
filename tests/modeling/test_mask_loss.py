"""Mask targets on shapes known exactly; mask losses by hand, far from initialisation."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor

from mask_rcnn_plugin.modeling.mask_loss import (
    IndependentMasks,
    MultinomialMasks,
    find_masks,
    mask_targets,
)

Masks = PolygonMasks | BitMasks


def sigmoid_mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits (R, M, M) of each RoI's class."""
    return IndependentMasks().loss(logits[:, None], targets, torch.zeros(len(logits)).long())


def softmax_mask_loss(logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    return MultinomialMasks().loss(logits, targets, classes)


def targets_of(masks: Masks, boxes: Tensor, side: int) -> Tensor:
    """In a batch of one image."""
    return mask_targets([masks], [boxes], side)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


SQUARE = [4, 4, 20, 4, 20, 20, 4, 20]


def square_masks(kind: str) -> PolygonMasks | BitMasks:
    if kind == "polygon":
        return PolygonMasks([[SQUARE]])
    bitmap = torch.zeros(1, 24, 24, dtype=torch.bool)
    bitmap[0, 4:20, 4:20] = True
    return BitMasks(bitmap)


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([0, 0, 24, 24], (1, 5), (1, 5)),  # cells of 4 px
        ([4, 4, 20, 20], (0, 6), (0, 6)),  # the square itself
        ([12, 0, 24, 24], (1, 5), (0, 4)),  # its right half, cells of 2 x 4 px
        ([0, 12, 24, 24], (0, 4), (1, 5)),  # its lower half
        ([20, 0, 24, 24], (0, 0), (0, 0)),  # beside it
    ],
)
def test_targets_of_a_square(
    kind: str, box: list[float], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    targets = targets_of(square_masks(kind), torch.tensor([box], dtype=torch.float32), 6)
    expected = torch.zeros(1, 6, 6, dtype=torch.bool)
    expected[0, slice(*rows), slice(*columns)] = True
    assert targets.dtype == torch.bool
    assert targets.tolist() == expected.tolist()


def test_targets_of_a_ring_keep_the_hole() -> None:
    bitmap = torch.zeros(1, 24, 24, dtype=torch.bool)
    bitmap[0, 4:20, 4:20] = True
    bitmap[0, 8:16, 8:16] = False
    targets = targets_of(BitMasks(bitmap), torch.tensor([[0.0, 0, 24, 24]]), 6)
    assert targets[0].int().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_each_target_comes_from_its_own_mask_and_box() -> None:
    masks = PolygonMasks(
        [[SQUARE], [[0, 0, 2, 0, 2, 24, 0, 24], [22, 0, 24, 0, 24, 24, 22, 24]]]  # two parts
    )
    boxes = torch.tensor([[4.0, 4, 20, 20], [0, 0, 24, 24]])
    targets = targets_of(masks, boxes, 12)
    assert targets[0].all()
    assert targets[1].all(dim=0).nonzero().flatten().tolist() == [0, 11]
    assert targets[1].sum() == 24


@pytest.mark.parametrize("masks", [BitMasks(torch.zeros(0, 24, 24)), PolygonMasks([])])
def test_targets_of_nothing(masks: PolygonMasks | BitMasks) -> None:
    targets = targets_of(masks, torch.zeros(0, 4), 28)
    assert targets.shape == (0, 28, 28)
    assert targets.dtype == torch.bool


def test_targets_refuse_other_counts() -> None:
    with pytest.raises(ValueError, match=r"\[2\] boxes for \[1\] gt_masks"):
        targets_of(square_masks("polygon"), torch.zeros(2, 4), 28)
    with pytest.raises(ValueError, match=r"\[0\] boxes for \[1\] gt_masks"):
        targets_of(square_masks("bitmask"), torch.zeros(0, 4), 28)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes in and about an image of 120 x 90, a few of them with no or a negative area."""
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([150.0, 120]) - 15
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes[::9, 2] = boxes[::9, 0]  # no width
    boxes[1::9, 3] = boxes[1::9, 1] + 0.05  # below detectron2's smallest height
    boxes[2::9] = boxes[2::9].round()
    boxes[3::9, 2:] = boxes[3::9, :2] + 28  # cells of a pixel: one scale for both sides
    boxes[4::9] = boxes[4::9, [2, 3, 0, 1]]
    return boxes


@pytest.mark.parametrize("side", [14, 28])
def test_targets_of_polygons_are_detectron2s(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    polygons = []
    for i in range(180):
        parts = []
        for _ in range(i % 4):  # none at all, too
            points = torch.randint(3, 40, (), generator=generator).item()
            centre = torch.rand(2, generator=generator) * torch.tensor([120.0, 90])
            spread = 60 * torch.rand((), generator=generator)
            polygon = centre + spread * (torch.rand(points, 2, generator=generator) - 0.5)
            parts.append(polygon.double().flatten().numpy())
        polygons.append(parts)
    masks = PolygonMasks(polygons)
    boxes = random_boxes(180, generator)
    expected = masks.crop_and_resize(boxes, side)
    targets = targets_of(masks, boxes, side)
    assert torch.equal(targets, expected)
    assert 0.2 < targets.flatten(1).any(dim=1).float().mean() < 0.8
    for ours, given in zip(masks.polygons, polygons, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, given, strict=True))


def test_targets_of_many_parts_upon_each_other() -> None:
    targets = targets_of(PolygonMasks([[SQUARE] * 256]), torch.tensor([[4.0, 4, 20, 20]]), 8)
    assert targets.all()


@pytest.mark.parametrize("side", [14, 28])
def test_targets_of_bitmaps_are_detectron2s(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(45, 1, 12, 9, generator=generator)
    bitmaps = torch.nn.functional.interpolate(coarse, size=(90, 120), mode="bilinear")[:, 0] > 0
    masks = BitMasks(bitmaps)
    boxes = random_boxes(45, generator)
    expected = masks.crop_and_resize(boxes, side)
    at_once = []

    def count(masks: BitMasks, boxes: Tensor, side: int) -> Tensor:
        at_once.append(len(boxes))
        return crop_and_resize(masks, boxes, side)

    crop_and_resize = BitMasks.crop_and_resize
    monkeypatch.setattr(BitMasks, "crop_and_resize", count)
    targets = targets_of(masks, boxes, side)
    assert torch.equal(targets, expected)
    assert 0.2 < targets.float().mean() < 0.8
    # RoIAlign takes float bitmaps of the whole image, four bytes a pixel.
    assert max(at_once) <= 8


LOGITS = [[[8.0, -8.0], [5.0, -3.0]], [[0.0, 2.0], [-6.0, 4.0]]]
TARGETS = [[[1, 0], [0, 1]], [[1, 1], [1, 0]]]
# Cross-entropy of a logit x is softplus(-x) in the mask and softplus(x) outside.
SIGMOID_LOSS = (
    (softplus(-8) + softplus(-8) + softplus(5) + softplus(3))
    + (softplus(0) + softplus(-2) + softplus(6) + softplus(4))
) / 8


@pytest.mark.parametrize("target_dtype", [torch.bool, torch.float32])
def test_sigmoid_loss_by_hand(target_dtype: torch.dtype) -> None:
    loss = sigmoid_mask_loss(torch.tensor(LOGITS), torch.tensor(TARGETS, dtype=target_dtype))
    assert loss.item() == pytest.approx(SIGMOID_LOSS, rel=1e-6)
    assert loss.item() == pytest.approx(2.3621, abs=1e-4)


def test_sigmoid_loss_gradient_by_hand() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    targets = torch.tensor(TARGETS, dtype=torch.bool)
    sigmoid_mask_loss(logits, targets).backward()
    expected = (torch.tensor(LOGITS).sigmoid() - targets.float()) / 8
    torch.testing.assert_close(logits.grad, expected)


def test_losses_of_huge_logits_are_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4]]])
    assert sigmoid_mask_loss(logits, torch.tensor([[[True, False]]])).item() == 0
    assert sigmoid_mask_loss(logits, torch.tensor([[[False, True]]])).item() == pytest.approx(1e4)
    classes = torch.tensor([0])
    per_class = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)
    wrong = softmax_mask_loss(per_class, torch.tensor([[[False]]]), classes)
    assert wrong.item() == pytest.approx(2e4)


# Two RoIs, K = 2 and background, one row of two cells.
CLASS_LOGITS = [
    [[[6.0, -4.0]], [[1.0, 3.0]], [[-2.0, 5.0]]],
    [[[2.0, 7.0]], [[9.0, -3.0]], [[-1.0, 4.0]]],
]
CLASSES = [0, 1]
INSIDE = [[[1, 0]], [[1, 1]]]


def log_softmax(of: float, *logits: float) -> float:
    return of - math.log(sum(math.exp(x) for x in logits))


@pytest.mark.parametrize("target_dtype", [torch.bool, torch.float32])
def test_softmax_loss_by_hand(target_dtype: torch.dtype) -> None:
    loss = softmax_mask_loss(
        torch.tensor(CLASS_LOGITS),
        torch.tensor(INSIDE, dtype=target_dtype),
        torch.tensor(CLASSES),
    )
    expected = -(
        log_softmax(6, 6, 1, -2)  # class 0
        + log_softmax(5, -4, 3, 5)  # background
        + log_softmax(9, 2, 9, -1)  # class 1
        + log_softmax(-3, 7, -3, 4)  # class 1
    )
    assert loss.item() == pytest.approx(expected / 4, rel=1e-6)
    assert loss.item() > 1


def test_softmax_classes_compete_and_sigmoid_classes_do_not() -> None:
    logits = torch.tensor(CLASS_LOGITS, requires_grad=True)
    softmax_mask_loss(logits, torch.tensor(INSIDE), torch.tensor(CLASSES)).backward()
    assert logits.grad.ne(0).all()


def test_class_agnostic_softmax_is_a_binary_loss() -> None:
    logits = torch.tensor([[[[3.0, -2.0]], [[-1.0, 4.0]]]])  # the object, background
    inside = torch.tensor([[[True, True]]])
    loss = softmax_mask_loss(logits, inside, torch.tensor([0]))
    # Of two logits a softmax is the sigmoid of their difference.
    assert loss.item() == pytest.approx((softplus(-4) + softplus(6)) / 2, rel=1e-6)
    difference = sigmoid_mask_loss(logits[:, 0] - logits[:, 1], inside)
    assert loss.item() == pytest.approx(difference.item(), rel=1e-6)


def test_the_sigmoid_of_multinomial_masks_is_the_softmax() -> None:
    logits = MultinomialMasks()(torch.tensor(CLASS_LOGITS))
    assert logits.shape == (2, 2, 1, 2)
    expected = [
        [[math.exp(log_softmax(6, 6, 1, -2)), math.exp(log_softmax(-4, -4, 3, 5))]],
        [[math.exp(log_softmax(9, 2, 9, -1)), math.exp(log_softmax(-3, 7, -3, 4))]],
    ]
    torch.testing.assert_close(logits.sigmoid()[[0, 1], CLASSES], torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_multinomial_masks_of_huge_logits_are_probabilities(dtype: torch.dtype) -> None:
    maps = torch.tensor([1e4, -1e4, 0], dtype=dtype).view(1, 3, 1, 1)
    assert MultinomialMasks()(maps).sigmoid().flatten().tolist() == [1, 0]


def test_independent_masks_are_logits_already() -> None:
    maps = torch.randn(2, 3, 4, 4)
    assert torch.equal(IndependentMasks()(maps), maps)


def test_number_of_maps() -> None:
    assert [find_masks(loss)().num_maps(80) for loss in ("sigmoid", "softmax")] == [80, 81]


def test_images_of_a_batch_have_their_targets_in_order() -> None:
    squares = [PolygonMasks([[SQUARE]]), PolygonMasks([]), PolygonMasks([[SQUARE], [SQUARE]])]
    boxes = [
        torch.tensor([[0.0, 0, 24, 24]]),
        torch.zeros(0, 4),
        torch.tensor([[4.0, 4, 20, 20], [12, 0, 24, 24]]),
    ]
    one_by_one = [targets_of(m, b, 6) for m, b in zip(squares, boxes) if len(m)]
    assert torch.equal(mask_targets(squares, boxes, 6), torch.cat(one_by_one))
    bitmaps = [BitMasks.from_polygon_masks(squares[0], 24, 24)]
    bitmaps.append(BitMasks.from_polygon_masks(squares[2], 40, 30))  # an image of another size
    targets = mask_targets(bitmaps, [boxes[0], boxes[2]], 6)
    assert torch.equal(targets, torch.cat(one_by_one))


def test_boxes_go_to_the_host_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda t: copied.append(t.shape) or cpu(t))
    boxes = torch.tensor([[4.0, 4, 20, 20]])
    mask_targets([PolygonMasks([[SQUARE]])] * 3, [boxes] * 3, 6)
    assert copied == [(3, 4)]


def test_a_batch_of_polygons_and_bitmaps() -> None:
    """An image keeps its polygons if all of its masks are such, else all are bitmaps."""
    polygons = PolygonMasks([[SQUARE], [SQUARE]])
    bitmaps = BitMasks.from_polygon_masks(polygons, 32, 32)
    boxes = torch.tensor([[4.0, 4, 20, 20], [0, 0, 12, 12]])
    targets = mask_targets([polygons, bitmaps, polygons], [boxes] * 3, 6)
    expected = [m.crop_and_resize(boxes, 6) for m in (polygons, bitmaps, polygons)]
    assert torch.equal(targets, torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_are_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sigmoid = sigmoid_mask_loss(torch.tensor(LOGITS, dtype=dtype), torch.tensor(TARGETS))
    assert sigmoid.dtype == wide
    assert sigmoid.item() == pytest.approx(SIGMOID_LOSS, rel=1e-6)
    softmax = softmax_mask_loss(
        torch.tensor(CLASS_LOGITS, dtype=dtype), torch.tensor(INSIDE), torch.tensor(CLASSES)
    )
    assert softmax.dtype == wide


def empty_sigmoid(logits: Tensor) -> Tensor:
    return sigmoid_mask_loss(logits[:, 0], torch.zeros(0, 14, 14, dtype=torch.bool))


def empty_softmax(logits: Tensor) -> Tensor:
    targets = torch.zeros(0, 14, 14, dtype=torch.bool)
    return softmax_mask_loss(logits, targets, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("loss", [empty_sigmoid, empty_softmax])
def test_losses_without_rois(loss: object) -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    logits = torch.einsum("rchw,kc->rkhw", torch.zeros(0, 3, 14, 14), weight)
    value = loss(logits)
    assert value.item() == 0
    value.backward()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("maps", [(2, 3, 4, 4), (1, 1, 4, 4), (2, 1, 4, 5), (2, 4, 4)])
def test_sigmoid_loss_refuses_other_shapes(maps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        IndependentMasks().loss(torch.zeros(maps), torch.zeros(2, 4, 4), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("logits", "targets", "classes"),
    [
        ((2, 4, 4), (2, 4, 4), 2),
        ((2, 3, 4, 4), (2, 4, 5), 2),
        ((2, 3, 4, 4), (1, 4, 4), 2),
        ((2, 3, 4, 4), (2, 4, 4), 1),
    ],
)
def test_softmax_loss_refuses_other_shapes(
    logits: tuple[int, ...], targets: tuple[int, ...], classes: int
) -> None:
    with pytest.raises(ValueError, match=r"must be \(R, K \+ 1, M, M\)"):
        softmax_mask_loss(
            torch.zeros(logits), torch.zeros(targets), torch.zeros(classes, dtype=torch.int64)
        )


def test_targets_agree_between_polygons_and_their_bitmaps() -> None:
    star = [12, 1, 15, 9, 23, 9, 17, 14, 19, 22, 12, 17, 5, 22, 7, 14, 1, 9, 9, 9]
    polygons = PolygonMasks([[np.array(star, dtype=np.float64)]])
    box = torch.tensor([[0.0, 0, 24, 24]])
    bitmaps = BitMasks.from_polygon_masks(polygons, 24, 24)
    agreement = targets_of(polygons, box, 24) == targets_of(bitmaps, box, 24)
    assert agreement.float().mean() > 0.97
