"""Winograd's convolution against the definition, in double precision."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from mask_rcnn_plugin import optimize_for_inference
from mask_rcnn_plugin.fast import winograd
from mask_rcnn_plugin.fast.winograd import (
    WinogradConv2d,
    use_winograd,
    winograd_conv,
    winograd_matrices,
)

Check = Callable[..., None]

# Whole tiles, parts of one, less than one; images of several chunks, chunks of several images.
SIZES = [(1, 16, 16), (1, 17, 30), (2, 13, 19), (1, 3, 70), (1, 70, 1), (40, 7, 7), (1, 50, 75)]
FEW_TILES = [(1, 1, 1), (1, 12, 16), (3, 5, 6), (0, 14, 14)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def definition(x: Tensor, conv: nn.Conv2d) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double(), conv.weight.double(), bias, padding=1)


def conv3x3(channels: int = 256, out_channels: int = 256, **kwargs: Any) -> Conv2d:
    conv = Conv2d(channels, out_channels, **({"kernel_size": 3, "padding": 1} | kwargs))
    return conv.to(memory_format=torch.channels_last).requires_grad_(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs of `winograd_conv`."""
    shapes = []

    def spy(x: Tensor, *args: Any) -> Tensor:
        shapes.append(x.shape)
        return winograd_conv(x, *args)

    monkeypatch.setattr(winograd, "winograd_conv", spy)
    return shapes


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES + FEW_TILES)
def test_is_the_convolution(size: tuple[int, int, int], bias: bool, relu: bool) -> None:
    torch.manual_seed(0)
    n, *extent = size
    conv, x = conv3x3(24, 40, bias=bias), draw(n, 24, *extent)
    matrices = winograd_matrices(conv.weight)
    result = winograd_conv(x, conv.weight, matrices, conv.bias, relu)
    expected = definition(x, conv)
    expected = expected.relu() if relu else expected
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    if result.numel():
        assert (result - expected).abs().max() < 5e-6 * expected.abs().max()
    anew = conv.weight + 1  # of which the matrices know nothing
    same = torch.equal(result, winograd_conv(x, anew, matrices, conv.bias, relu))
    assert same == (size in SIZES or not result.numel())


def test_rounding_at_full_width() -> None:
    torch.manual_seed(0)
    conv, x = conv3x3(256, 256), draw(1, 256, 50, 68).relu()
    expected = definition(x, conv)
    error = (use_winograd(conv)(x) - expected).abs().max() / expected.abs().max()
    assert error < 5e-6  # 1.5e-6 to 4e-6, by the processor's order of summation


def test_input_of_any_layout() -> None:
    x = draw(2, 256, 20, 20)
    conv = use_winograd(conv3x3())
    expected = conv(x)
    for other in (x.contiguous(), draw(2, 256, 22, 21)[:, :, 1:-1, 1:].copy_(x)):
        assert torch.equal(conv(other), expected)


@pytest.mark.parametrize("activation", [None, nn.ReLU(), F.relu, torch.sigmoid])
def test_activation_follows(activation: Callable[[Tensor], Tensor] | None, calls: list) -> None:
    conv, x = conv3x3(activation=activation), draw(1, 256, 20, 20)
    expected = conv(x)
    fast = use_winograd(conv)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5)
    assert calls == [x.shape]


def test_plain_convolution_where_winograd_does_not_apply(calls: list) -> None:
    x = draw(1, 256, 20, 20)
    plain = conv3x3()
    fast = use_winograd(copy.deepcopy(plain))
    assert torch.equal(copy.deepcopy(fast).double()(x.double()), plain.double()(x.double()))
    plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x))
        assert fast(x).dtype == torch.bfloat16
    leaf = x.clone().requires_grad_()
    fast(leaf).sum().backward()
    assert leaf.grad is not None
    fast.requires_grad_(True)
    fast(x).sum().backward()
    assert fast.weight.grad is not None
    assert calls == []
    with torch.no_grad():
        fast(leaf)
    assert calls == [x.shape]


def test_which_convolutions_are_replaced() -> None:
    gains = [{}, {"bias": False}, {"activation": nn.ReLU()}, {"out_channels": 260}]
    gains_not: list[dict[str, Any]] = [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2},
        {"stride": 2},
        {"padding": 0},
        {"padding": 2, "dilation": 2},
        {"groups": 2},
        {"channels": 255},
        {"out_channels": 255},
        {"padding_mode": "reflect"},
        {"norm": get_norm("GN", 256)},
        {"dtype": torch.float64},
        {"device": "meta"},
    ]
    for cases, expected in ((gains, WinogradConv2d), (gains_not, Conv2d)):
        for case in cases:
            conv = conv3x3(**case)
            keys = conv.state_dict().keys()
            model = nn.Sequential(conv)
            assert use_winograd(model) is model
            assert type(model[0]) is expected, case
            assert model[0].state_dict().keys() == keys
            assert model[0].weight is conv.weight
    torch_conv = nn.Conv2d(256, 256, 3, padding=1)
    assert type(use_winograd(torch_conv)) is nn.Conv2d


def test_loaded_weights_take_effect() -> None:
    first, second = use_winograd(conv3x3()), use_winograd(conv3x3())
    x = draw(1, 256, 20, 20)
    assert not torch.equal(first(x), second(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


class Heads(nn.Module):
    """detectron2's own, as wide as in its models."""

    def __init__(self) -> None:
        super().__init__()
        self.rpn = StandardRPNHead(in_channels=256, num_anchors=3)
        shape = ShapeSpec(channels=256, height=14, width=14)
        self.mask = MaskRCNNConvUpsampleHead(shape, num_classes=2, conv_dims=[256, 256, 256])

    def forward(self, x: Tensor) -> list[Tensor]:
        logits, deltas = self.rpn([x, x[:, :, ::4, ::4]])
        return [*logits, *deltas, self.mask.layers(x)]


def test_optimize_for_inference_uses_it(calls: list) -> None:
    model, x = Heads().eval(), draw(3, 256, 14, 14)
    with torch.no_grad():
        expected = model(x)
        assert calls == []
        result = optimize_for_inference(model)(x)
        assert len(calls) == 2 + 2  # the levels of the RPN, the convolutions before the last
        calls.clear()
        optimize_for_inference(model, channels_last=False)(x)
    assert calls == []
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not any(isinstance(m, WinogradConv2d) for m in model.modules())


def test_is_one_operation_to_the_compiler() -> None:
    conv = use_winograd(conv3x3(24, 40))
    args = (draw(2, 24, 13, 19), conv.weight, winograd_matrices(conv.weight), conv.bias, True)
    torch.library.opcheck(winograd_conv, args)
    few = (draw(1, 24, 5, 6).contiguous(), *args[1:3], None, False)
    torch.library.opcheck(winograd_conv, few)
