"""RoI layers against values by hand, a NumPy reference, and detectron2's pooler."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor

from mask_rcnn_plugin.modeling import RoIAlign, RoIPooler, RoIWarp
from mask_rcnn_plugin.modeling.roi_pooling import find_roi_layer

LAYERS = [
    ("RoIPool", "max"),
    ("RoIWarp", "max"),
    ("RoIWarp", "ave"),
    ("RoIAlign", "max"),
    ("RoIAlign", "ave"),
]


def ramp(height: int, width: int, stride: int) -> Tensor:
    """(1, 2, height, width): each cell holds the x and the y, in pixels, of its own centre."""
    y = (torch.arange(height) + 0.5) * stride
    x = (torch.arange(width) + 0.5) * stride
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def rois(*boxes: list[float]) -> Tensor:
    return torch.tensor([[0, *box] for box in boxes], dtype=torch.float32)


def grid(xs: list[float], ys: list[float]) -> Tensor:
    """What a pooled `ramp` holds if its bins read the given columns and rows."""
    x, y = torch.tensor(xs), torch.tensor(ys)
    return torch.stack([x.expand(len(ys), -1), y[:, None].expand(-1, len(xs))])


# The reference, from the definitions in Fast R-CNN (RoIPool) and Mask R-CNN, one number at a time.


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def reference_pool(feature: np.ndarray, box: list[float], scale: float, bins: int) -> np.ndarray:
    """RoIPool: corners rounded to cells that both belong to the RoI, bins of whole cells."""
    x0, y0, x1, y1 = (round_half_up(c * scale) for c in box)
    bin_w, bin_h = max(x1 - x0 + 1, 1) / bins, max(y1 - y0 + 1, 1) / bins
    out = np.zeros((len(feature), bins, bins))
    for i in range(bins):
        for j in range(bins):
            top, bottom = math.floor(i * bin_h) + y0, math.ceil((i + 1) * bin_h) + y0
            left, right = math.floor(j * bin_w) + x0, math.ceil((j + 1) * bin_w) + x0
            cells = feature[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
            if cells.size:
                out[:, i, j] = cells.max(axis=(1, 2))
    return out


def bilinear(feature: np.ndarray, x: float, y: float) -> np.ndarray:
    """Value at a point of the frame in which cell (0, 0) has its centre at (0, 0).

    Beyond the outermost centres the outermost cell goes on, for one cell; then there is nothing.
    """
    height, width = feature.shape[1:]
    if not (-1 <= x <= width and -1 <= y <= height):
        return np.zeros(len(feature))
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - left, y - top
    row0 = (1 - a) * feature[:, top, left] + a * feature[:, top, left + 1]
    row1 = (1 - a) * feature[:, top + 1, left] + a * feature[:, top + 1, left + 1]
    return (1 - b) * row0 + b * row1


def sample(
    feature: np.ndarray, corners: list[float], bins: int, points: int, aggregation: str
) -> np.ndarray:
    """points x points regularly placed samples in each of bins x bins bins."""
    x0, y0, x1, y1 = corners
    out = np.zeros((len(feature), bins, bins))
    for i in range(bins):
        for j in range(bins):
            values = [
                bilinear(
                    feature,
                    x0 + (x1 - x0) * (j + (b + 0.5) / points) / bins,
                    y0 + (y1 - y0) * (i + (a + 0.5) / points) / bins,
                )
                for a in range(points)
                for b in range(points)
            ]
            out[:, i, j] = np.max(values, 0) if aggregation == "max" else np.mean(values, 0)
    return out


def reference(
    name: str, aggregation: str, feature: np.ndarray, box: list[float], scale: float, bins: int
) -> np.ndarray:
    if name == "RoIPool":
        return reference_pool(feature, box, scale, bins)
    if name == "RoIWarp":
        x0, y0, x1, y1 = (round_half_up(c * scale) for c in box)
        corners = [x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)]
    else:
        # Continuous coordinates: the centre of cell 0 is at 0.5.
        corners = [c * scale - 0.5 for c in box]
    return sample(feature, corners, bins, 2, aggregation)


@pytest.mark.parametrize(("name", "aggregation"), LAYERS)
@pytest.mark.parametrize("bins", [1, 3, 7])
@pytest.mark.parametrize("scale", [1 / 4, 1 / 16])
def test_equals_the_definition(name: str, aggregation: str, bins: int, scale: float) -> None:
    rng = np.random.default_rng(bins)
    features = rng.normal(size=(2, 3, 9, 12))
    size = np.array([12, 9, 12, 9]) / scale
    corners = rng.uniform(0, 1, size=(8, 2, 2))
    inside = np.concatenate([corners.min(1), corners.max(1)], axis=1) * size
    boxes = [
        *inside.tolist(),
        [-21.0, -11.0, 20.0, 30.0],  # partly outside, each side
        [size[0] - 15, size[1] - 10, size[0] + 31, size[1] + 17],
        [-90.0, -90.0, -50.0, -40.0],  # wholly outside
        [13.0, 11.0, 13.7, 11.2],  # much smaller than a cell
        [17.0, 9.0, 17.0, 9.0],  # a point
    ]
    images = rng.integers(0, 2, size=len(boxes))
    layer = find_roi_layer(name)((bins, bins), scale, 2, aggregation=aggregation)
    pooled = layer(
        torch.from_numpy(features),
        torch.tensor([[i, *box] for i, box in zip(images, boxes)], dtype=torch.float64),
    )
    for out, image, box in zip(pooled.numpy(), images, boxes):
        expected = reference(name, aggregation, features[image], box, scale, bins)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12, err_msg=f"{box}")


def test_roi_align_reads_the_centre_of_each_bin() -> None:
    out = RoIAlign((2, 4), 1 / 4)(ramp(16, 16, 4), rois([8, 16, 40, 48], [9.5, 10, 25.5, 17]))
    # Bins of 8 x 16 px, then of 4 x 3.5.
    torch.testing.assert_close(out[0], grid([12.0, 20, 28, 36], [24.0, 40]))
    torch.testing.assert_close(out[1], grid([11.5, 15.5, 19.5, 23.5], [11.75, 15.25]))


def test_roi_align_max_reads_the_largest_of_the_four_points() -> None:
    out = RoIAlign((2, 2), 1 / 4, 2, aggregation="max")(ramp(16, 16, 4), rois([8, 16, 40, 48]))
    # Points at 1/4 and 3/4 of a bin of 16 px; the ramp's largest is the last one.
    torch.testing.assert_close(out[0], grid([20.0, 36], [28.0, 44]))


def test_number_of_points_a_bin_follows_sampling_ratio() -> None:
    three = RoIAlign((1, 1), 1 / 4, 3, aggregation="max")(ramp(16, 16, 4), rois([12, 12, 24, 36]))
    torch.testing.assert_close(three[0], grid([12 + 12 * 5 / 6], [12 + 24 * 5 / 6]))
    feature = torch.zeros(1, 1, 16, 16)
    feature[0, 0, 5, 5] = 1
    # One point, between four cells, sees a quarter of the one; adaptive sampling the mean of 2x2.
    box = rois([20, 20, 28, 28])
    assert RoIAlign((1, 1), 1 / 4, 1)(feature, box).item() == pytest.approx(1 / 4)
    box = rois([16, 16, 32, 32])
    assert RoIAlign((1, 1), 1 / 4, 0)(feature, box).item() == pytest.approx(1 / 16)
    assert RoIAlign((1, 1), 1 / 4, 1)(feature, box).item() == pytest.approx(1 / 4)


def test_unaligned_roi_align_is_half_a_cell_off() -> None:
    out = find_roi_layer("ROIAlign")((1, 1), 1 / 4)(ramp(16, 16, 4), rois([8, 16, 40, 48]))
    torch.testing.assert_close(out[0], grid([24.0 + 2], [32.0 + 2]))


def test_roi_warp_rounds_the_corners_halves_up() -> None:
    # In cells 1.5, 2.5, 6.5, 4.25: rounded 2, 3, 7, 4 (to even it would be 2, 2, 6, 4).
    out = RoIWarp((1, 1), 1 / 4)(ramp(16, 16, 4), rois([6, 10, 26, 17]))
    # Cell index 4.5 by 3.5, whose centres in pixels are 4 (index + 1/2).
    torch.testing.assert_close(out[0], grid([20.0], [16.0]))


def test_roi_warp_is_unaligned_roi_align_of_the_rounded_roi() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 3, 16, 16)
    warp = RoIWarp((7, 7), 1 / 4)(features, rois([6, 10, 26.5, 49], [3.9, 0, 5.9, 60]))
    align = RoIAlign((7, 7), 1 / 4, aligned=False)(features, rois([8, 12, 28, 48], [4, 0, 4, 60]))
    torch.testing.assert_close(warp, align, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["RoIPool", "ROIPool"])
def test_roi_pool_on_a_small_map(name: str) -> None:
    feature = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    # In cells 0.6, 1.4, 2.5, 3: rounded 1, 1, 3, 3, both ends included: cells 1..3, bins 1.5 wide
    # that share the middle cell.
    out = find_roi_layer(name)((2, 2), 1 / 10)(feature[None, None], rois([6, 14, 25, 30]))
    assert out[0, 0].tolist() == [[22, 23], [32, 33]]
    out = find_roi_layer(name)((2, 2), 1 / 10)(-feature[None, None], rois([6, 14, 25, 30]))
    assert out[0, 0].tolist() == [[-11, -12], [-21, -22]]


@pytest.mark.parametrize(("name", "aggregation"), LAYERS)
def test_gradients(name: str, aggregation: str) -> None:
    torch.manual_seed(0)
    # Distinct values, so that the maximum is differentiable.
    features = torch.randperm(2 * 2 * 6 * 6).double().view(2, 2, 6, 6).div(10).requires_grad_()
    boxes = torch.tensor(
        [[0, 1.3, 2.1, 17.9, 20.2], [1, -3.1, 4.2, 11.3, 30.7], [1, 5.3, 5.1, 5.9, 6.2]],
        dtype=torch.float64,
    )
    layer = find_roi_layer(name)((2, 2), 1 / 4, 2, aggregation=aggregation)
    assert torch.autograd.gradcheck(lambda x: layer(x, boxes), [features])


@pytest.mark.parametrize(("name", "aggregation"), LAYERS)
def test_no_roi(name: str, aggregation: str) -> None:
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = find_roi_layer(name)((7, 7), 1 / 4, 2, aggregation=aggregation)(
        features, torch.zeros(0, 5)
    )
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert features.grad.eq(0).all()


@pytest.mark.parametrize(
    ("name", "box", "expected"),
    [
        ("RoIAlign", [1204, 12, 1208, 16], 1.0),  # from edge to edge of cell 301
        ("RoIWarp", [1204, 12, 1208, 16], 0.5),  # from centre to centre of 301 and 302
        ("RoIPool", [1204, 12, 1204, 16], 1.0),  # cell 301 alone
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_of_another_precision_keep_exact_boxes(
    name: str, box: list[float], expected: float, dtype: torch.dtype
) -> None:
    # With the 8 bits of bfloat16, 1204 would be 1200, a cell to the left.
    features = torch.zeros(1, 1, 8, 512, dtype=dtype)
    features[..., 301] = 1
    out = find_roi_layer(name)((1, 1), 1 / 4, 1)(features, rois(box))
    assert out.dtype == dtype
    assert out.item() == expected


def levels(strides: tuple[int, ...] = (4, 8, 16, 32)) -> list[Tensor]:
    """Feature maps of a 1024 x 1024 image that hold the number of their own FPN level."""
    return [torch.full((1, 1, 1024 // s, 1024 // s), math.log2(s)) for s in strides]


@pytest.mark.parametrize(("name", "aggregation"), LAYERS)
def test_each_roi_reads_the_level_of_its_size(name: str, aggregation: str) -> None:
    pooler = RoIPooler(2, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, name, aggregation=aggregation)
    sizes = {
        (224, 224): 4,
        (223, 223): 3,
        (112, 112): 3,
        (111, 111): 2,
        (448, 448): 5,
        (447, 447): 4,
        (56, 56): 2,
        (4, 4): 2,  # clamped
        (900, 900): 5,
        (56, 224): 3,  # the root of the area counts, 112
        (448, 112): 4,
    }
    boxes = torch.tensor([[8.0, 16, 8 + w, 16 + h] for w, h in sizes])
    out = pooler(levels(), [Boxes(boxes)])
    torch.testing.assert_close(
        out, torch.tensor(list(sizes.values()))[:, None, None, None].expand(-1, 1, 2, 2).float()
    )


def test_canonical_size_and_level() -> None:
    pooler = RoIPooler(1, [1 / 4, 1 / 8], canonical_box_size=32, canonical_level=3)
    out = pooler(levels((4, 8)), [Boxes(torch.tensor([[0.0, 0, 31, 31], [0, 0, 32, 32]]))])
    assert out.flatten().tolist() == [2, 3]


def test_one_level_takes_every_roi_and_keeps_their_order() -> None:
    features = torch.tensor([10.0, 20]).view(2, 1, 1, 1).expand(2, 1, 64, 64).contiguous()
    pooler = RoIPooler(7, [1 / 16])
    out = pooler(
        [features],
        [Boxes(torch.tensor([[0.0, 0, 9, 9]])), Boxes(torch.tensor([[0.0, 0, 900, 900]] * 2))],
    )
    assert out[:, 0, 3, 3].tolist() == [10, 20, 20]


@pytest.mark.parametrize(("name", "aggregation"), LAYERS)
@pytest.mark.parametrize("scales", [[1 / 8], [1 / 4, 1 / 8]])
def test_pooler_without_boxes(name: str, aggregation: str, scales: list[float]) -> None:
    torch.manual_seed(0)
    features = [torch.rand(3, 2, round(64 * s), round(64 * s)) + 1 for s in scales]
    pooler = RoIPooler(3, scales, 2, name, aggregation=aggregation)
    none, one = Boxes(torch.zeros(0, 4)), Boxes(torch.tensor([[8.0, 8, 40, 40]]))
    assert pooler(features, [none, none, none]).shape == (0, 2, 3, 3)
    some = pooler(features, [none, one, none])
    assert some.shape == (1, 2, 3, 3)
    alone = pooler([f[1:2] for f in features], [one])
    torch.testing.assert_close(some, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ROIAlignV2", "ROIAlign", "ROIPool"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_detectron2_names_give_detectron2s_numbers(name: str, sampling_ratio: int) -> None:
    torch.manual_seed(0)
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    features = [torch.randn(2, 3, round(512 * s), round(512 * s)) for s in scales]
    corners = torch.rand(2, 20, 2, 2) * 512
    boxes = [Boxes(torch.cat([c.amin(1), c.amax(1)], dim=1)) for c in corners]
    ours = RoIPooler(7, scales, sampling_ratio, name)(features, boxes)
    theirs = ROIPooler(7, scales, sampling_ratio, name)(features, boxes)
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_roi_align_is_detectron2s_second_version() -> None:
    torch.manual_seed(0)
    features, boxes = [torch.randn(1, 2, 8, 8)], [Boxes(torch.tensor([[3.0, 5, 29, 31]]))]
    ours = RoIPooler(7, [1 / 4])(features, boxes)
    torch.testing.assert_close(ours, ROIPooler(7, [1 / 4], 2, "ROIAlignV2")(features, boxes))


@pytest.mark.parametrize("scales", [[1 / 16], [1 / 8, 1 / 16]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["RoIAlign", "RoIPool"])
def test_pooled_features_keep_the_layout(
    name: str, layout: torch.memory_format, scales: list[float]
) -> None:
    features = [
        torch.randn(1, 3, round(256 * s), round(256 * s)).to(memory_format=layout) for s in scales
    ]
    boxes = [Boxes(torch.tensor([[3.0, 5, 29, 31], [0, 0, 200, 200]]))]
    pooled = RoIPooler(7, scales, 2, name)(features, boxes)
    assert pooled.is_contiguous(memory_format=layout)
    features = [f.contiguous() for f in features]
    torch.testing.assert_close(pooled, RoIPooler(7, scales, 2, name)(features, boxes))


@pytest.mark.parametrize("scales", [[1 / 8], [1 / 4, 1 / 8]])
def test_a_box_that_is_no_number_is_empty(scales: list[float]) -> None:
    features = [torch.rand(1, 2, round(64 * s), round(64 * s)) + 1 for s in scales]
    boxes = torch.tensor([[8.0, 8, 40, 40], [math.nan] * 4])
    pooled = RoIPooler(3, scales)(features, [Boxes(boxes)])
    assert (pooled[0] > 1).all()
    assert pooled[1].eq(0).all()


def test_no_image() -> None:
    assert RoIPooler(7, [1 / 4])([torch.zeros(0, 4, 8, 8)], []).shape == (0, 4, 7, 7)


@pytest.mark.parametrize(("maps", "images"), [(1, 2), (2, 1), (2, 3)])
def test_refuses_maps_and_boxes_that_do_not_fit(maps: int, images: int) -> None:
    features = [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)][:maps]
    with pytest.raises(ValueError, match=f"{maps} feature maps and boxes of {images} images"):
        RoIPooler(7, [1 / 4, 1 / 8])(features, [Boxes(torch.zeros(0, 4))] * images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooler_type": "RoiAlign"}, "pooler_type is 'RoiAlign'"),
        ({"aggregation": "mean"}, "aggregation is 'mean'"),
        ({"pooler_type": "RoIWarp", "aggregation": "avg"}, "aggregation is 'avg'"),
        ({"sampling_ratio": 0, "aggregation": "max"}, "sampling_ratio is 0"),
        ({"sampling_ratio": -1}, "sampling_ratio is -1"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoIPooler(7, [1 / 16], **arguments)


def test_repr_tells_the_layer() -> None:
    assert repr(RoIWarp((7, 7), 1 / 16, 2, aggregation="max")) == (
        "RoIWarp(output_size=(7, 7), spatial_scale=0.0625, sampling_ratio=2, aligned=False, "
        "aggregation='max')"
    )


@pytest.mark.parametrize("aggregation", ["ave", "max"])
def test_roi_warp_casts_the_feature_map_once(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = torch.randn(1, 2, 8, 8, requires_grad=True).bfloat16()
    casts = []
    to = Tensor.to

    def spy(x: Tensor, *args: object) -> Tensor:
        out = to(x, *args)
        casts.append((tuple(x.shape), x.dtype == out.dtype))
        return out

    monkeypatch.setattr(Tensor, "to", spy)
    RoIWarp((2, 2), 1 / 4, aggregation=aggregation)(features, rois([3, 5, 20, 22]))
    assert [same for shape, same in casts if shape == (1, 2, 8, 8)] == [False]


def test_arguments_are_detectron2s_in_its_order() -> None:
    features = [torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32)]
    boxes = [Boxes(torch.tensor([[3.0, 5, 25, 31], [30, 30, 90, 100]]))]
    arguments = ((7, 5), [1 / 4, 1 / 8], 2, "ROIAlign", 32, 3)
    theirs = ROIPooler(*arguments)
    ours = RoIPooler(*arguments)
    assert ours(features, boxes).shape == (2, 3, 7, 5)
    for level, (one, other) in enumerate(zip(ours.level_poolers, theirs.level_poolers)):
        assert isinstance(one, ROIAlign)
        whole = torch.cat([torch.zeros(2, 1), boxes[0].tensor], dim=1)
        torch.testing.assert_close(one(features[level], whole), other(features[level], whole))
    assert (ours.canonical_box_size, ours.canonical_level) == (32, 3)
