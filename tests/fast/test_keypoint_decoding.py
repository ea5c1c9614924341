"""Keypoint decoding against detectron2's, and by hand, as CPUs and as GPUs do it."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from detectron2.structures import Keypoints
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import Tensor

from benchmark.cuda_rules import CudaRules
from mask_rcnn_plugin.fast import keypoint_decoding, keypoint_search
from mask_rcnn_plugin.fast.keypoint_decoding import (
    decode_at_once,
    decode_by_need,
    decode_keypoints,
    decode_whole,
)

Decode = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(params=[decode_by_need, decode_at_once])
def decode(request: pytest.FixtureRequest) -> Decode:
    return request.param


def test_decoding_gives_the_centre_of_the_winning_cell(decode: Decode) -> None:
    logits = torch.zeros(2, 2, 8, 8)
    logits[0, 0, 2, 5] = 30
    logits[0, 1, 7, 0] = 30
    logits[1, 0, 0, 7] = 30
    logits[1, 1, 4, 4] = 30
    # In the first box a cell is a pixel, in the second 5 x 3 px.
    boxes = torch.tensor([[100.0, 50, 108, 58], [10.0, 20, 50, 44]])
    points = decode(logits, boxes)
    assert points.shape == (2, 2, 3)
    assert points[0, :, :2].tolist() == [[105.5, 52.5], [100.5, 57.5]]
    # Bicubic resizing spreads a peak, at the border as far as it.
    centres = torch.tensor([[10 + 7.5 * 5, 20 + 0.5 * 3], [10 + 4.5 * 5, 20 + 4.5 * 3]])
    assert (points[1, :, :2] - centres).abs().max() <= 2.5


def test_decoded_score_is_the_probability_of_the_cell(decode: Decode) -> None:
    logits = torch.zeros(1, 1, 8, 8)
    logits[0, 0, 3, 3] = 4
    points = decode(logits, torch.tensor([[0.0, 0, 8, 8]]))
    assert points[0, 0, 2].item() == pytest.approx(math.exp(4) / (math.exp(4) + 63), rel=1e-5)


@pytest.mark.parametrize("side", [8, 56])
def test_what_is_encoded_is_decoded(decode: Decode, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[3.0, 5, 3 + side, 5 + side]])
    points = torch.rand(1, 10, 2, generator=generator) * side + torch.tensor([3.0, 5])
    keypoints = Keypoints(torch.cat([points, torch.ones(1, 10, 1)], 2))
    cells, has_target = keypoints.to_heatmap(boxes, side)
    assert has_target.all()
    logits = torch.nn.functional.one_hot(cells, side**2).view(1, 10, side, side) * 20.0
    decoded = decode(logits, boxes)
    torch.testing.assert_close(decoded[..., :2], points.floor() + 0.5)


def test_decoding_nothing(decode: Decode) -> None:
    assert decode(torch.zeros(0, 17, 56, 56), torch.zeros(0, 4)).shape == (0, 17, 3)


def test_decoding_carries_no_gradient() -> None:
    logits = torch.randn(1, 2, 8, 8, requires_grad=True)
    assert not decode_keypoints(logits, torch.tensor([[0.0, 0, 20, 30]])).requires_grad


def test_decoding_spares_its_input(decode: Decode) -> None:
    logits = torch.randn(1, 2, 8, 8)
    before = logits.clone()
    decode(logits, torch.tensor([[0.0, 0, 20, 30]]))
    assert torch.equal(logits, before)


def some_maps(kind: str, count: int, side: int = 56, seed: int = 0) -> Tensor:
    """(count, 5, side, side) logits; "people" are peaks as a trained branch gives them, of all
    widths and now and then two of nearly one height; "tails" fall to hundreds below their peak."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 5, side, side)
    if kind == "noise":
        return torch.randn(shape, generator=generator) * 3
    coarse = torch.randn(count, 5, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    if kind == "smooth":
        return smooth * 5
    axis = torch.arange(side) + 0.5
    if kind == "tails":
        rows, columns = (axis - torch.rand(2, count, 5, 1, generator=generator) * side) ** 2
        return 8 - (rows[..., None] + columns[..., None, :]) * (56 / side) ** 2 / 20
    maps = smooth - 8
    for height in (14, 13.99):
        centre = torch.rand(2, count, 5, 1, generator=generator) * (side + 4) - 2
        width = 0.5 + 3 * torch.rand(count, 5, 1, 1, generator=generator)
        rows, columns = (axis - centre) ** 2
        maps += height * torch.exp(-(rows[..., None] + columns[..., None, :]) / (2 * width**2))
    return maps


def some_boxes(count: int, largest: float, seed: int = 0) -> Tensor:
    """Sides from half a pixel up, evenly on the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    sides = 0.5 * (largest / 0.5) ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * 500
    return torch.cat([corner, corner + sides], dim=1)


def assert_decoded_as_detectron2(decode: Decode, logits: Tensor, boxes: Tensor) -> None:
    ours = decode(logits, boxes)
    theirs = heatmaps_to_keypoints(logits, boxes)[..., [0, 1, 3]]
    # A pixel away would be at least 1/2.
    torch.testing.assert_close(ours[..., :2], theirs[..., :2], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours[..., 2], theirs[..., 2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["people", "smooth", "tails", "noise"])
@pytest.mark.parametrize(("count", "side", "largest"), [(150, 56, 400), (80, 14, 60), (20, 28, 1)])
def test_decoding_is_detectron2s(
    decode: Decode, kind: str, count: int, side: int, largest: float
) -> None:
    assert_decoded_as_detectron2(decode, some_maps(kind, count, side), some_boxes(count, largest))


@pytest.mark.parametrize("kind", ["people", "smooth", "tails"])
def test_few_maps_are_resized_whole(
    decode: Decode, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized = []

    def count(logits: Tensor, boxes: Tensor) -> Tensor:
        resized.append(logits.shape[1])
        return heatmaps_to_keypoints(logits, boxes)

    def count_at_once(padded: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        resized.append(len(padded))
        return resize_whole(padded, *args)

    resize_whole = keypoint_search._resize_whole
    monkeypatch.setattr(keypoint_decoding, "heatmaps_to_keypoints", count)
    monkeypatch.setattr(keypoint_search, "_resize_whole", count_at_once)
    boxes = some_boxes(40, 300) + torch.tensor([0.0, 0, 56, 56])
    decode(some_maps(kind, 40), boxes)
    assert sum(resized) <= 0.1 * 40 * 5


def test_decoding_channels_last_logits(decode: Decode) -> None:
    logits = some_maps("people", 20).to(memory_format=torch.channels_last)
    assert_decoded_as_detectron2(decode, logits, some_boxes(20, 200))


def test_decoding_in_a_huge_box(decode: Decode) -> None:
    boxes = torch.tensor([[10.3, 20.6, 2011.9, 1900.2], [5.5, 3, 2000, 9.2]])
    assert_decoded_as_detectron2(decode, some_maps("people", 2), boxes)


def test_decoding_tiny_and_huge_boxes_at_once(decode: Decode) -> None:
    """In no order of size, in more than one chunk."""
    sides = torch.tensor([0.3, 900, 12, 1, 250, 56, 700, 3, 57, 55, 400, 2])
    count = 3 * len(sides)
    boxes = torch.zeros(count, 4)
    boxes[:, 2], boxes[:, 3] = sides.repeat(3), sides.repeat_interleave(3)
    assert (boxes[:, 2:].prod(dim=1) > 56**2).sum() > keypoint_decoding.ROIS_AT_ONCE
    for kind in ("people", "tails"):
        assert_decoded_as_detectron2(decode, some_maps(kind, count), boxes + 7.7)


@pytest.mark.parametrize("value", [0.0, 3.7, -123.4])
def test_decoding_flat_maps(decode: Decode, value: float) -> None:
    """Rounding decides, so it has to be detectron2's; all zeros are a tie, which the first wins."""
    has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if value and decode is decode_at_once and not has_fma:
        pytest.skip("rounds as torch's kernels for CPUs with fused multiply-add")
    boxes = some_boxes(6, 300)
    logits = torch.full((6, 2, 56, 56), value)
    assert_decoded_as_detectron2(decode, logits, boxes)
    if value == 0:
        points = decode(logits, boxes)
        sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
        first = boxes[:, :2] + 0.5 * sizes / sizes.ceil()
        torch.testing.assert_close(points[..., :2], first[:, None].expand(6, 2, 2))


def test_decoding_ties(decode: Decode) -> None:
    """Two equal peaks, and a plateau: the first in row-major order wins."""
    logits = torch.zeros(1, 3, 16, 16)
    logits[0, 0, 3, [4, 9]] = 5
    logits[0, 1, [2, 12], [13, 1]] = 5
    logits[0, 2, 5:9, 5:9] = 5
    for side in (16.0, 8, 32, 160):
        assert_decoded_as_detectron2(decode, logits, torch.tensor([[0, 0, side, side]]))
    points = decode(logits, torch.tensor([[0.0, 0, 16, 16]]))
    assert points[0, :, :2].tolist() == [[4.5, 3.5], [13.5, 2.5], [5.5, 5.5]]


def test_decoding_a_peak_at_every_border_cell(decode: Decode) -> None:
    side = 8
    rim = [(r, c) for r in range(side) for c in range(side) if r in (0, 7) or c in (0, 7)]
    logits = torch.zeros(2, len(rim), side, side)
    for i, (row, column) in enumerate(rim):
        logits[:, i, row, column] = 9
    assert_decoded_as_detectron2(decode, logits, torch.tensor([[0.0, 0, 33.3, 57], [0, 0, 3, 20]]))


@pytest.mark.parametrize("scale", [1e-3, 10])
def test_decoding_small_and_large_logits(decode: Decode, scale: float) -> None:
    boxes = some_boxes(20, 200)
    logits = some_maps("smooth", 20) * scale
    ours = decode(logits, boxes)
    theirs = heatmaps_to_keypoints(logits, boxes)
    torch.testing.assert_close(ours[..., :2], theirs[..., :2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_decoding_half_precision_logits_and_under_autocast(
    on_gpu: bool, dtype: torch.dtype
) -> None:
    logits, boxes = some_maps("people", 20).to(dtype), some_boxes(20, 300)
    expected = heatmaps_to_keypoints(logits.float(), boxes)[..., [0, 1, 3]]
    with CudaRules() if on_gpu else nullcontext(), torch.autocast("cpu", dtype):
        if on_gpu:
            logits, boxes = logits.to("cuda"), boxes.to("cuda")
        points = decode_keypoints(logits, boxes).cpu()
    assert points.dtype == torch.float32
    torch.testing.assert_close(points, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_decoding_on_a_gpu() -> None:
    logits, boxes = some_maps("people", 20), some_boxes(20, 300)
    points = decode_keypoints(logits.cuda(), boxes.cuda())
    torch.testing.assert_close(points.cpu(), decode_keypoints(logits, boxes), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["people", "noise"])
def test_decoding_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, boxes = some_maps(kind, 30), some_boxes(30, 300)
    expected = decode_at_once(logits, boxes)
    monkeypatch.setattr(keypoint_search, "PIXELS_AT_ONCE", 100_000)
    assert torch.equal(decode_at_once(logits, boxes), expected)


@pytest.mark.parametrize("size", [math.nan, math.inf])
def test_a_box_without_a_finite_size(decode: Decode, size: float) -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, size, 9]])
    for it in (decode, heatmaps_to_keypoints):
        with pytest.raises((ValueError, OverflowError)):
            it(torch.randn(2, 3, 8, 8), boxes)


def test_decoding_in_boxes_without_area(decode: Decode) -> None:
    boxes = torch.tensor([[3.0, 4, 3, 4], [5, 5, 1, 80], [7, 7, 90, 7]])
    assert_decoded_as_detectron2(decode, some_maps("people", 3), boxes)


@pytest.mark.parametrize(
    ("kind", "smallest", "largest"),
    [
        ("people", 0.5, 400),
        ("noise", 0.5, 150),
        ("noise", 1, 10),
        ("people", 600, 1000),
        ("flat", 1, 50),
    ],
)
def test_what_decoding_costs_on_a_gpu(kind: str, smallest: float, largest: float) -> None:
    """Two images with a hundred people each; boxes to the last without a side, too."""
    maps = torch.full((200, 5, 56, 56), 3.7) if kind == "flat" else some_maps(kind, 200)
    logits = torch.cat([maps, maps, maps, maps[:, :2]], dim=1)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 500
    sides = smallest + torch.rand(200, 2, generator=generator) * (largest - smallest)
    sides[-1] = 0
    boxes = torch.cat([corners, corners + sides], dim=1)
    with CudaRules() as cuda:
        logits, boxes = logits.to("cuda"), boxes.to("cuda")
        with cuda.counted() as cost:
            decode_keypoints(logits, boxes)
        waits, copies, operators = cost.totals()
        assert waits <= 4, cost.lines()
        assert copies == 0, cost.lines()
        assert operators <= 300, cost.lines()


@pytest.mark.parametrize("count", [0, 1, 6])
def test_an_exports_decoding_is_detectron2s(count: int, assert_near: Callable[..., None]) -> None:
    logits = torch.randn(count, 3, 8, 8) * 3
    starts = torch.rand(count, 2) * 20
    sizes = torch.tensor([[30.0, 41.5], [0.2, 60], [7.9, 3], [55, 0], [16, 16], [1, 1]])[:count]
    boxes = torch.cat([starts, starts + sizes], dim=1)
    expected = heatmaps_to_keypoints(logits, boxes)[:, :, [0, 1, 3]]
    assert_near(decode_whole(logits, boxes), expected)
