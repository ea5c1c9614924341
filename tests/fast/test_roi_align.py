"""RoIAlign as a weighted sum of cells against torchvision's operator: values and gradients."""

import pytest
import torch
import torchvision
from torch import Tensor

from mask_rcnn_plugin.fast.roi_align import roi_align


def draw(dtype: torch.dtype = torch.float32, count: int = 60) -> tuple[Tensor, Tensor]:
    """Features of two images, and RoIs from a fraction of a cell to larger than the image, many
    of them partly, some wholly outside."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 20, 28, generator=generator)
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([112.0, 80])
    sizes = torch.exp(torch.rand(count, 2, generator=generator) * 6 - 1)
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
    boxes[:3] -= 200
    boxes[3] = torch.tensor([16.0, 8, 48, 40])  # samples on cell centres
    boxes[4] = torch.tensor([16.0, 8, 16, 40])  # no width
    images = torch.arange(count)[:, None] % 2
    return features.to(dtype), torch.cat([images, boxes], dim=1).to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("size", "points"), [((7, 7), 2), ((3, 5), 1), ((14, 14), 3), ((7, 3), 0)])
def test_values_and_gradients_are_torchvisions(
    size: tuple[int, int],
    points: int,
    aligned: bool,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    features, rois = draw(dtype)
    layouts = (layout, torch.contiguous_format)
    inputs = [features.clone(memory_format=x).requires_grad_() for x in layouts]
    functions = (roi_align, torchvision.ops.roi_align)
    ours, theirs = (f(x, rois, size, 1 / 4, points, aligned) for f, x in zip(functions, inputs))
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    assert ours.dtype == dtype
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for pooled in (ours, theirs):
        (pooled * weights).sum().backward()
    assert inputs[1].grad.abs().max() > 1
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_roi_and_no_gradient(points: int, dtype: torch.dtype) -> None:
    pooled = roi_align(torch.randn(2, 5, 20, 28).to(dtype), torch.zeros(0, 5), (7, 7), 1, points)
    assert pooled.shape == (0, 5, 7, 7)
    assert pooled.dtype == dtype


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("shape", [(2, 5, 20, 28), (0, 5, 20, 28)])
def test_no_roi(points: int, shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, requires_grad=True)
    pooled = roi_align(features, torch.zeros(0, 5), (7, 7), 1 / 4, points)
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()
    assert features.grad.eq(0).all()


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_and_does_not_move(dtype: torch.dtype, points: int) -> None:
    features, rois = draw()
    features = features.to(dtype)
    ours = roi_align(features, rois, (7, 7), 1 / 4, points)
    assert ours.dtype == dtype
    exact = roi_align(features.double(), rois.double(), (7, 7), 1 / 4, points)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_boxes_get_no_gradient() -> None:
    features, rois = draw()
    rois.requires_grad_()
    roi_align(features.requires_grad_(), rois, (7, 7), 1 / 4, 2).sum().backward()
    assert rois.grad is None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("points", [0, 2])
def test_a_trace_takes_other_rois(points: int) -> None:
    features, rois = draw()
    arguments = ((7, 7), 1 / 4, points)
    traced = torch.jit.trace(lambda x, r: roi_align(x, r, *arguments), (features, rois[:20]))
    torch.testing.assert_close(traced(features, rois), roi_align(features, rois, *arguments))
