"""3x3 convolutions with a quarter of the multiplications, Winograd's F(4x4, 3x3).

Four outputs along an axis depend on six inputs. Like the coefficients of a product of polynomials,
they follow from six values: evaluate both factors at six points, one of them infinity, multiply
value by value, interpolate. So a tile of 4 x 4 outputs takes 6 * 6 = 36 multiplications for each
input and output channel, and the definition 4 * 4 * 9 = 144. At each of the 36 points, the sum over
input channels is a matrix product.

Evaluation and interpolation are passes over the data, whose share falls with the number of
channels, so only wide layers gain: 1.7 to 2 times the speed with 256 channels, 1.5 on RoIs of
14 x 14, where a quarter of the tiles' area lies outside; on two cores little with 128 channels, and
a loss with 64. Points of similar size keep rounding small: errors are up to 1.5e-6 of the largest
output, compared with 0.2e-6 for the definition and 7e-6 for the usual points 0, +-1, +-2. The
matrices take 36 / 9 = 4 times the memory of the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from mask_rcnn_plugin.fast.replacement import Module, conv_like, replace_modules

_MIN_CHANNELS = 256
_MIN_TILES = 16  # with fewer, reading the matrices takes longest
_TILES = 128  # at a time: their values stay in the cache, and the products are large enough


def _evaluate(coefficients: int) -> Tensor:
    """(6, coefficients): from the coefficients of a polynomial, lowest first, to its values; at
    infinity, that is the highest coefficient."""
    points = torch.tensor([0, 0.75, -0.75, 1.5, -1.5], dtype=torch.float64, device="cpu")
    powers = points[:, None] ** torch.arange(coefficients, device="cpu")
    return torch.cat([powers, F.pad(powers.new_ones(1, 1), (coefficients - 1, 0))])


# A convolution layer is the transpose of multiplying by a polynomial, its weight.
_OF_WEIGHT = _evaluate(3)
_OF_INPUT = _evaluate(6).inverse().T.float()
_TO_OUTPUT = _evaluate(4).T.float()


def _on_both_axes(matrix: Tensor, tiles: Tensor) -> Tensor:
    """matrix @ tile @ matrix^T: (i, j, ...) -> (a, b, the rest flattened)."""
    size, length = matrix.shape
    rows = matrix @ tiles.reshape(length, -1)
    return torch.bmm(matrix.expand(size, -1, -1), rows.view(size, length, -1))


def winograd_matrices(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (36, C, K), a weight for each point."""
    matrices = _on_both_axes(_OF_WEIGHT, weight.detach().double().permute(2, 3, 1, 0))
    return matrices.view(36, *weight.shape[1::-1]).float()


@torch.library.custom_op("mask_rcnn_plugin::winograd_conv", mutates_args=())
def winograd_conv(
    x: Tensor, weight: Tensor, matrices: Tensor, bias: Tensor | None, relu: bool
) -> Tensor:
    """3x3 convolution with zero padding 1, by Winograd's algorithm if there are enough tiles.

    A single operator for `torch.compile`.

    Args:
        x: (N, C, H, W), float32, on the CPU; fastest channels-last.
        weight: (K, C, 3, 3)
        matrices: `winograd_matrices(weight)`
        bias: (K,)
        relu: whether ReLU follows.

    Returns:
        (N, K, H, W), channels-last, without a gradient.
    """
    (n, channels, height, width), out_channels = x.shape, len(weight)
    down, across = -(-height // 4), -(-width // 4)  # tiles of an image
    if n * down * across < _MIN_TILES:
        out = F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)
        return out.relu_() if relu else out
    out = x.new_empty(n, height, width, out_channels)
    bias = out.new_zeros(out_channels) if bias is None else bias
    rows = min(down, -(-_TILES // across))
    images = max(1, _TILES // (rows * across))
    for first in range(0, n, images):
        for top in range(0, 4 * down, 4 * rows):
            bottom = min(top + 4 * rows, 4 * down)
            # Zeros around the image to whole tiles; a negative number of them crops.
            border = (0, 0, 1, 4 * across - width + 1, 1 - top, bottom - height + 1)
            t = F.pad(x[first : first + images].permute(0, 2, 3, 1), border)
            t = t.unfold(1, 6, 4).unfold(2, 6, 4)  # (images, rows, across, C, 6, 6)
            grid = t.shape[:3]
            t = _on_both_axes(_OF_INPUT, t.permute(4, 5, 0, 1, 2, 3))
            t = torch.bmm(t.view(36, -1, channels), matrices)
            t = _on_both_axes(_TO_OUTPUT, t.view(6, 6, -1))
            t = t.view(4, 4, *grid, out_channels).permute(2, 3, 0, 4, 1, 5)
            t = t.reshape(grid[0], bottom - top, 4 * across, out_channels)
            part = out[first : first + images, top:bottom]
            torch.add(t[:, : part.shape[1], :width], bias, out=part)
            if relu:
                part.relu_()
    return out.permute(0, 3, 1, 2)


@winograd_conv.register_fake
def _(x: Tensor, weight: Tensor, matrices: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    n, _, height, width = x.shape
    return x.new_empty(n, height, width, len(weight)).permute(0, 3, 1, 2)


class WinogradConv2d(Conv2d):
    """detectron2's `Conv2d` with a weight that does not change, by `winograd_conv`.

    A plain convolution where a gradient is needed, on a GPU, in another precision, and in a trace.
    """

    matrices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        float32 = x.dtype == self.weight.dtype == torch.float32
        plain = grad or not (float32 and x.is_cpu) or torch.is_autocast_enabled("cpu")
        if plain or torch.jit.is_tracing():
            return super().forward(x)
        relu = isinstance(self.activation, nn.ReLU)
        x = winograd_conv(x, self.weight, self.matrices, self.bias, relu)
        return x if relu or self.activation is None else self.activation(x)

    def __prepare_scriptable__(self) -> Conv2d:
        """What `torch.jit.script` compiles in its place."""
        return conv_like(self, Conv2d, norm=None)


def _take_weight(conv: WinogradConv2d, *_: Any) -> None:
    conv.matrices = winograd_matrices(conv.weight)


def use_winograd(module: Module) -> Module:
    """Put a `WinogradConv2d` in the place of each `Conv2d` that gains by it.

    Those that gain are 3x3, of stride 1, without norm, with 256 channels or more, in float32 on the
    CPU. Weights must not change afterwards, except by `load_state_dict`.

    Args:
        module: changed in place, unless it is such a `Conv2d` itself.

    Returns:
        `module`, or what takes its place; with the same parameters and state dict.
    """

    def fast(conv: nn.Module) -> nn.Module | None:
        if type(conv) is not Conv2d or conv.norm is not None or conv.padding_mode != "zeros":
            return None
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        enough = min(conv.in_channels, conv.out_channels) >= _MIN_CHANNELS
        float32 = conv.weight.is_cpu and conv.weight.dtype == torch.float32
        if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or not (enough and float32):
            return None
        new = conv_like(conv, WinogradConv2d, norm=None)
        new.register_buffer("matrices", winograd_matrices(new.weight), persistent=False)
        new.register_load_state_dict_post_hook(_take_weight)
        return new

    return replace_modules(module, fast)
