"""Modules in the place of others, wherever a model finds them."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone import FPN
from torch import nn

from mask_rcnn_plugin.fast.folding import FrozenBNConv2d, fold_frozen_batch_norm
from mask_rcnn_plugin.fast.replacement import conv_like, replace_modules
from mask_rcnn_plugin.modeling import resnet_backbone


def tanh_for_relu(module: nn.Module) -> nn.Module | None:
    return nn.Tanh() if isinstance(module, nn.ReLU) else None


def test_by_name_in_containers_and_lists() -> None:
    model = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    model["c"] = nn.ModuleList([model["a"]])  # twice in the model
    model.in_order = [model["a"], model["b"], "text"]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert replace_modules(model, tanh_for_relu) is model
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
    assert isinstance(model["b"][1], nn.Tanh)
    assert isinstance(model["a"], nn.Tanh)
    assert model["c"][0] is model["a"]
    assert model.in_order == [model["a"], model["b"], "text"]


def test_the_module_itself() -> None:
    assert isinstance(replace_modules(nn.ReLU(), tanh_for_relu), nn.Tanh)


def test_nothing_to_replace() -> None:
    layer = nn.Linear(2, 2)
    assert replace_modules(layer, tanh_for_relu) is layer


def test_a_convolution_of_another_class_shares_what_it_has() -> None:
    conv = Conv2d(
        4, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1), groups=2, bias=False,
        norm=get_norm("BN", 6), activation=torch.tanh,
    ).eval()  # fmt: skip
    before = torch.get_rng_state()
    new = conv_like(conv, FrozenBNConv2d, conv.norm)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(new) is FrozenBNConv2d
    assert new.weight is conv.weight
    assert new.bias is None
    assert new.norm is conv.norm
    assert not new.training
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(new(x), conv(x))


def test_an_fpn_calls_the_new_convolutions() -> None:
    bottom_up = resnet_backbone("ResNet-10-C5", width=8, norm="BN")
    fpn = fold_frozen_batch_norm(FPN(bottom_up, ["res5"], 8, norm="FrozenBN"))
    lateral, output = fpn.fpn_lateral5, fpn.fpn_output5
    assert type(lateral) is type(output) is FrozenBNConv2d
    calls = []
    for conv in (lateral, output):
        conv.register_forward_hook(lambda module, *_: calls.append(module))
    fpn.eval()(torch.zeros(1, 3, 32, 32))
    assert calls == [lateral, output]


def test_stages_of_a_folded_backbone_freeze() -> None:
    backbone = resnet_backbone("ResNet-18-C4", width=8, norm="BN", freeze_at=0)
    fold_frozen_batch_norm(backbone.freeze(2))
    assert type(backbone.res2[0].conv1) is FrozenBNConv2d
    backbone.freeze(3)
    assert isinstance(backbone.res3[0].conv1.norm, FrozenBatchNorm2d)
    assert not any(p.requires_grad for p in backbone.res3.parameters())
    fold_frozen_batch_norm(backbone)
    assert type(backbone.res3[0].conv1) is FrozenBNConv2d
    backbone(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("copied", [False, True])
def test_gradients_reach_the_parameters_of_old(copied: bool) -> None:
    conv = Conv2d(3, 4, 1, norm=get_norm("FrozenBN", 4))
    model = fold_frozen_batch_norm(nn.Sequential(conv))
    if copied:
        model = copy.deepcopy(model)
    model(torch.ones(1, 3, 2, 2)).sum().backward()
    assert (conv.weight.grad is None) == copied
    assert model[0].weight.grad is not None
