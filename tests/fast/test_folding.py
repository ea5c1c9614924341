"""Frozen batch norm inside the convolution against detectron2's two steps."""

import copy
from collections.abc import Callable

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from torch import Tensor, nn

from mask_rcnn_plugin.fast.folding import (
    FrozenBNConv2d,
    fold_batch_norm_for_inference,
    fold_frozen_batch_norm,
)
from mask_rcnn_plugin.modeling import res5_head, resnet_backbone

Check = Callable[..., None]


def network(norm: str, redraw: Check) -> nn.Sequential:
    """Convolutions of every kind, each with its norm."""
    layers = nn.Sequential(
        Conv2d(3, 8, 3, padding=1, bias=False, norm=get_norm(norm, 8), activation=nn.ReLU()),
        Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, norm=get_norm(norm, 8)),
        Conv2d(8, 12, 3, groups=4, bias=False, norm=get_norm(norm, 12), activation=torch.relu),
        Conv2d(12, 4, 1),
    )
    redraw(layers)
    return layers


def image() -> Tensor:
    return torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_values_and_gradients_are_those_of_two_steps(redraw: Check, assert_near: Check) -> None:
    theirs = network("FrozenBN", redraw)
    ours = fold_frozen_batch_norm(copy.deepcopy(theirs))
    assert [type(layer) for layer in ours] == [FrozenBNConv2d] * 3 + [Conv2d]
    x, y = image(), image()
    out, expected = ours(x), theirs(y)
    assert_near(out, expected)
    out.square().mean().backward()
    expected.square().mean().backward()
    assert_near(x.grad, y.grad, "image")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert q.grad.abs().max() > 0
        assert_near(p.grad, q.grad, name)


def test_state_dict_is_detectron2s(redraw: Check) -> None:
    theirs = network("FrozenBN", redraw)
    ours = fold_frozen_batch_norm(network("FrozenBN", redraw))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert "0.norm.running_mean" in ours.state_dict()


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_a_norm_that_trains_is_left_alone(norm: str) -> None:
    layers = nn.Sequential(Conv2d(3, 32, 1, norm=get_norm(norm, 32)))
    assert type(fold_frozen_batch_norm(layers)[0]) is Conv2d


@pytest.mark.parametrize("features", ["C4", "FPN"])
def test_the_backbones_have_no_pass_of_their_own(features: str) -> None:
    with torch.device("meta"):
        modules = [resnet_backbone(f"ResNet-50-{features}"), res5_head("ResNet-50-C4")]
    normed = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(getattr(m, "norm", None), FrozenBatchNorm2d)
    ]
    assert len(normed) > 40
    assert all(type(m) is FrozenBNConv2d for m in normed)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_folding_for_good(norm: str, redraw: Check, assert_near: Check) -> None:
    plain = network(norm, redraw).eval()
    folded = fold_batch_norm_for_inference(fold_frozen_batch_norm(copy.deepcopy(plain)))
    assert all(type(layer) is Conv2d and layer.norm is None for layer in folded)
    with torch.no_grad():
        assert_near(folded(image()), plain(image()))


def test_folding_for_good_leaves_other_norms(redraw: Check) -> None:
    layers = nn.Sequential(Conv2d(3, 32, 1, norm=get_norm("GN", 32))).eval()
    assert isinstance(fold_batch_norm_for_inference(layers)[0].norm, nn.GroupNorm)


@pytest.mark.parametrize("fold", [fold_frozen_batch_norm, fold_batch_norm_for_inference])
def test_no_image(fold: Callable[[nn.Module], nn.Module], redraw: Check) -> None:
    layers = fold(network("FrozenBN", redraw).eval())
    assert layers(torch.zeros(0, 3, 16, 20)).shape[:2] == (0, 4)


def test_a_norm_without_statistics_is_not_folded() -> None:
    conv = Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert fold_batch_norm_for_inference(conv.eval()).norm is not None


def _load(conv: nn.Module) -> None:
    conv.load_state_dict({k: v + 0.5 for k, v in conv.state_dict().items()})


def _another_buffer(conv: nn.Module) -> None:
    conv.norm.running_mean = conv.norm.running_mean + 1


def _through_data(conv: nn.Module) -> None:
    conv.norm.weight.data.fill_(3.0)
    conv.eval()


@pytest.mark.parametrize(
    "change",
    [
        _load,
        _another_buffer,
        _through_data,
        lambda conv: conv.norm.bias.add_(2),
        lambda conv: conv.norm.running_var.mul_(4),
        lambda conv: conv.double(),
    ],
)
def test_statistics_that_change_are_seen(
    change: Callable[[nn.Module], object], redraw: Check, assert_near: Check
) -> None:
    theirs = Conv2d(3, 4, 1, norm=FrozenBatchNorm2d(4))
    redraw(theirs)
    ours = fold_frozen_batch_norm(copy.deepcopy(theirs))
    x = image().detach()
    before = ours(x)
    assert_near(ours(x), before)
    for conv in (ours, theirs):
        change(conv)
    x = x.to(theirs.weight.dtype)
    assert (theirs(x) - before).abs().max() > 0.1 or theirs.weight.dtype == torch.float64
    assert_near(ours(x), theirs(x))
    assert_near(copy.deepcopy(ours)(x), theirs(x))


def test_what_inference_mode_made_is_not_trained_with(redraw: Check) -> None:
    conv = fold_frozen_batch_norm(Conv2d(3, 4, 1, norm=FrozenBatchNorm2d(4)))
    with torch.inference_mode():
        conv(image())
    conv(image()).sum().backward()
    assert conv.weight.grad is not None


def test_a_norm_put_in_place_later_is_used() -> None:
    conv = fold_frozen_batch_norm(Conv2d(3, 4, 1, norm=FrozenBatchNorm2d(4)))
    conv.norm = nn.BatchNorm2d(4)
    conv.train()(image())
    assert conv.norm.num_batches_tracked == 1
