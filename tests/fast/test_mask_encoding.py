"""Encoding against detectron2's pasting and pycocotools."""

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from pycocotools import mask as coco_mask
from torch import Tensor

from mask_rcnn_plugin.modeling import encode_masks

SIZE = (60, 80)


def smooth(count: int, side: int, seed: int = 0) -> Tensor:
    """Random blobs as a network gives them, probabilities on both sides of 1/2."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 5, 5, generator=generator) * 4
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[
        :, 0
    ].sigmoid()


def reference(
    probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> list[dict]:
    bitmaps = paste_masks_in_image(probs, boxes, size, threshold)
    rles = [coco_mask.encode(np.asfortranarray(b.numpy().astype(np.uint8))) for b in bitmaps]
    return [{"size": list(r["size"]), "counts": r["counts"].decode()} for r in rles]


BOXES = {
    "inside": [10.3, 20.7, 50.2, 44.9],
    "whole image": [0, 0, 80, 60],
    "left border": [0, 10.5, 20.5, 30.5],
    "lower right corner": [70.2, 50.1, 80, 60],
    "thinner than a pixel": [30.6, 10, 31.1, 50],
    "flatter than a pixel": [10, 20.4, 70, 20.6],
    "smaller than a pixel": [40.1, 40.1, 40.4, 40.4],
    "on pixel centres": [4.5, 5.5, 14.5, 15.5],
    "one row short of the image": [3.3, 0, 71.8, 58],
    "over the left border": [-20.3, 10.7, 30.2, 44.9],
    "over the upper right corner": [50.5, -9.25, 120, 30],
    "over the lower border": [12.5, 31.3, 44, 99.5],
    "around the image": [-40, -30.5, 150, 99],
    "no wider than a point": [20, 10, 20, 30],
    "infinite": [20, 10, float("inf"), 30],
    "from minus infinity": [-float("inf"), 10, 20, 30],
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("side", [14, 28])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_encodings_are_detectron2s(box: list[float], side: int, threshold: float) -> None:
    probs = torch.cat([smooth(3, side), torch.zeros(1, side, side), torch.ones(1, side, side)])
    boxes = torch.tensor([box] * 5)
    assert encode_masks(probs, boxes, SIZE, threshold) == reference(probs, boxes, SIZE, threshold)


def test_random_boxes() -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(40, 2, 2, generator=generator) * torch.tensor([80.0, 60])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    probs = smooth(40, 28)
    rles = encode_masks(probs, boxes, SIZE)
    assert rles == reference(probs, boxes, SIZE)
    assert len({r["counts"] for r in rles}) > 35


def test_a_full_mask_fills_its_box() -> None:
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([[5.0, 10, 25, 40]]), SIZE)
    assert rle["size"] == [60, 80]
    assert isinstance(rle["counts"], str)
    bitmap = coco_mask.decode(rle)
    assert bitmap.sum() == 20 * 30
    assert bitmap[10:40, 5:25].all()


def test_half_a_mask() -> None:
    probs = torch.zeros(1, 28, 28)
    probs[:, :, 14:] = 1
    (rle,) = encode_masks(probs, torch.tensor([[0.0, 0, 56, 56]]), SIZE)
    columns = coco_mask.decode(rle)[:56].all(axis=0).nonzero()[0]
    assert columns.tolist() == list(range(28, 56))


def test_probability_of_exactly_the_threshold_is_inside() -> None:
    (rle,) = encode_masks(torch.full((1, 28, 28), 0.5), torch.tensor([[8.0, 8, 36, 36]]), SIZE)
    inner = coco_mask.decode(rle)[9:35, 9:35]
    assert inner.all()


def test_no_mask() -> None:
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), SIZE) == []


NOWHERE = {
    "left of the image": [-40, 10, -10, 30],
    "below the image": [10, 70, 30, 90],
    "far to the right": [1e6, 10, 2e6, 30],
    "inside out": [50, 40, 10, 20],
    "left unknown": [float("nan"), 10, 30, 30],
    "bottom unknown": [10, 10, 30, float("nan")],
    "unknown": [float("nan")] * 4,
}


@pytest.mark.parametrize("box", NOWHERE.values(), ids=NOWHERE)
def test_a_mask_that_is_nowhere_is_empty(box: list[float]) -> None:
    """On most of these detectron2 ends with an error of `torch.arange`."""
    boxes = torch.tensor([box, [10.0, 10, 30, 30]])
    nowhere, somewhere = encode_masks(torch.ones(2, 28, 28), boxes, SIZE)
    assert coco_mask.decode(nowhere).sum() == 0
    assert nowhere == reference(torch.zeros(1, 28, 28), boxes[1:], SIZE)[0]
    assert coco_mask.decode(somewhere).sum() == 400


def test_unknown_probabilities_spoil_their_neighbours_only() -> None:
    probs = torch.ones(2, 28, 28)
    probs[0, 10, 5] = float("nan")
    probs[1] = float("nan")
    boxes = torch.tensor([[2.3, 5, 70.1, 51.5]] * 2)
    rles = encode_masks(probs, boxes, SIZE)
    assert rles == reference(probs, boxes, SIZE)
    spoilt, lost = (coco_mask.decode(r) for r in rles)
    assert 0 < (spoilt[5:51, 3:70] == 0).sum() < 30
    assert lost.sum() == 0


def test_ties_with_the_threshold_fall_as_detectron2s() -> None:
    """Halves, quarters and eighths, at scales at which pixels meet cells and their borders."""
    generator = torch.Generator().manual_seed(2)
    probs = torch.randint(0, 9, (60, 14, 14), generator=generator) / 8
    scale = torch.tensor([1, 2, 0.5, 3, 4, 0.25])[torch.arange(60) % 6]
    corner = torch.randint(0, 40, (60, 2), generator=generator) / 2
    boxes = torch.cat([corner, corner + 14 * scale[:, None]], dim=1)
    for threshold in (0.5, 0.375):
        rles = encode_masks(probs, boxes, SIZE, threshold)
        assert rles == reference(probs, boxes, SIZE, threshold)


def test_an_image_far_too_large_for_a_bitmap() -> None:
    corner = torch.tensor([50_000.0, 30_000])
    boxes = torch.cat([corner, corner + torch.tensor([20.0, 30])])[None]
    (rle,) = encode_masks(torch.ones(1, 28, 28), boxes, (60_000, 60_000))
    assert coco_mask.toBbox(rle).tolist() == [50_000, 30_000, 20, 30]
    assert coco_mask.area(rle) == 600


def test_a_large_corpus() -> None:
    """What a network gives in an image of COCO's size: at least 99.9% of the encodings are equal,
    the rest but for a pixel or two."""
    size, count = (480, 640), 3000
    generator = torch.Generator().manual_seed(3)
    # From hesitant to saturated.
    coarse = torch.randn(count, 1, 6, 6, generator=generator)
    coarse *= 10 ** torch.linspace(-2, 2, count).view(-1, 1, 1, 1)
    logits = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic")[:, 0]
    logits[::5] += torch.randn(count // 5, 28, 28, generator=generator)
    # Sides of 3 to 400 pixels, evenly on the logarithm; one box in three reaches out of the image.
    sides = 3 * (400 / 3) ** torch.rand(count, 2, generator=generator)
    image = torch.tensor([640.0, 480])
    corner = torch.rand(count, 2, generator=generator) * (image - sides)
    corner[::3] += (torch.rand(count // 3, 2, generator=generator) - 0.5) * sides[::3]
    boxes = torch.cat([corner, corner + sides], dim=1)
    probs = logits.sigmoid()
    different, empty = [], 0
    for i in range(0, count, 100):
        chunk = slice(i, i + 100)
        ours = encode_masks(probs[chunk], boxes[chunk], size)
        theirs = reference(probs[chunk], boxes[chunk], size)
        different += [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        empty += sum(coco_mask.area(r) == 0 for r in theirs)
    assert len(different) <= count // 1000
    for a, b in different:
        assert coco_mask.iou([a], [b], [0]) >= 0.9999
    assert empty < count // 5


def test_half_precision_probabilities() -> None:
    probs, boxes = smooth(2, 28).to(torch.bfloat16), torch.tensor([[3.0, 4, 60, 50]] * 2)
    assert encode_masks(probs, boxes, SIZE) == reference(probs.float(), boxes, SIZE)


@pytest.mark.parametrize("count", [255, 256, 1000])
def test_as_many_masks_as_there_are(count: int) -> None:
    """Parts of pycocotools count the masks of a call in a uint8."""
    probs, boxes = torch.ones(count, 2, 2), torch.tensor([[3.0, 4, 9, 8]]).repeat(count, 1)
    boxes[-1] += 20
    rles = encode_masks(probs, boxes, SIZE)
    assert len(rles) == count
    assert rles[:1] + rles[-1:] == reference(probs[-2:], boxes[-2:], SIZE)
