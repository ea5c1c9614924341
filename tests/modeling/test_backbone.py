"""Backbones by name: structure, parity with detectron2's builders, freezing, errors."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from mask_rcnn_plugin.modeling import res5_head, resnet_backbone, stage_channels
from mask_rcnn_plugin.modeling.backbone import build_mask_rcnn_resnet_backbone

Check = Callable[..., None]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def meta(name: str, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return resnet_backbone(name, **kwargs)


def config(depth: int, features: str) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_mask_rcnn_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    if features == "FPN":
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    else:
        cfg.MODEL.RESNETS.OUT_FEATURES = [{"C4": "res4", "C5": "res5"}[features]]
    return cfg


def toy_config() -> CfgNode:
    """ResNet-50-FPN a sixteenth as wide."""
    cfg = config(50, "FPN")
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    return cfg


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("features", ["C4", "C5", "FPN"])
def test_yaml_and_lazy_config_give_equal_backbones(depth: int, features: str) -> None:
    with torch.device("meta"):
        from_yaml = build_backbone(config(depth, features))
        from_lazy = instantiate(LazyCall(resnet_backbone)(name=f"ResNet-{depth}-{features}"))
    assert shapes(from_yaml) == shapes(from_lazy)
    assert from_yaml.output_shape() == from_lazy.output_shape()


@pytest.mark.parametrize(
    ("features", "outputs"),
    [
        ("C4", {"res4": (16, 1024)}),
        ("C5", {"res5": (32, 2048)}),
        ("FPN", {f"p{i}": (2**i, 256) for i in range(2, 7)}),
    ],
)
def test_feature_maps(features: str, outputs: dict[str, tuple[int, int]]) -> None:
    backbone = meta(f"ResNet-50-{features}")
    maps = backbone(torch.zeros(2, 3, 128, 192, device="meta"))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        k: (2, channels, 128 // stride, 192 // stride) for k, (stride, channels) in outputs.items()
    }
    declared = backbone.output_shape()
    assert {k: (v.stride, v.channels) for k, v in declared.items()} == outputs


@pytest.mark.parametrize("network", ["ResNet-18", "ResNet-50", "ResNeXt-101"])
@pytest.mark.parametrize("width", [64, 32])
def test_channels_known_without_a_model(network: str, width: int) -> None:
    backbone = meta(f"{network}-FPN", width=width)
    declared = backbone.bottom_up.output_shape()
    for stage in ("res2", "res3", "res4", "res5"):
        channels = stage_channels(f"{network}-C4", stage, width)
        assert declared[stage].channels == channels
        assert channels == (1 if network == "ResNet-18" else 4) * width * 2 ** (int(stage[3]) - 2)


def test_width_scales_every_layer() -> None:
    with torch.device("meta"):
        from_yaml = build_backbone(toy_config())
    assert shapes(from_yaml) == shapes(meta("ResNet-50-FPN", width=4, fpn_channels=16))
    with torch.device("meta"):
        head = res5_head("ResNet-50-C4", stride=2, width=4)
    assert shapes(head) == shapes(from_yaml.bottom_up.res5)


def test_fpn_channels() -> None:
    backbone = meta("ResNet-18-FPN", fpn_channels=64, fpn_norm="GN")
    assert backbone.output_shape()["p4"].channels == 64
    assert "fpn_lateral2.norm.weight" in backbone.state_dict()


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_depth(depth: int, blocks: tuple[int, ...]) -> None:
    backbone = meta(f"ResNet-{depth}-C5")
    assert tuple(len(stage) for stage in backbone.stages) == blocks


def test_resnext_101_is_64x4d() -> None:
    bottom_up = meta("ResNeXt-101-FPN", stride_in_1x1=False).bottom_up
    assert tuple(len(stage) for stage in bottom_up.stages) == (3, 4, 23, 3)
    for i, stage in enumerate(bottom_up.stages):
        for block in stage:
            assert block.conv2.groups == 64
            assert block.conv2.out_channels == 64 * 4 * 2**i
            assert block.conv3.out_channels == 256 * 2**i
    assert bottom_up.res3[0].conv1.stride == (1, 1)
    assert bottom_up.res3[0].conv2.stride == (2, 2)


@pytest.mark.parametrize("network", ["ResNet-18", "ResNet-34", "ResNet-101", "ResNeXt-101"])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_res5_head_is_the_stage_that_c4_leaves_out(network: str, norm: str) -> None:
    with torch.device("meta"):
        head = res5_head(f"{network}-C4", stride=2, norm=norm)
    assert shapes(head) == shapes(meta(f"{network}-C5", norm=norm).res5)


def test_defaults_are_those_of_the_papers_weights() -> None:
    backbone = meta("ResNet-50-C4")
    assert not any(p.requires_grad for p in backbone.res2.parameters())
    assert all(p.requires_grad for p in backbone.res3.parameters())
    assert backbone.res3[0].conv1.stride == res5_head("ResNet-50-C4", stride=2)[0].conv1.stride
    assert backbone.res3[0].conv1.stride == (2, 2)


@pytest.mark.parametrize(("in_1x1", "strides"), [(True, (2, 1)), (False, (1, 2))])
def test_stride_in_1x1(in_1x1: bool, strides: tuple[int, int]) -> None:
    for block in (
        meta("ResNet-50-C4", stride_in_1x1=in_1x1).res3[0],
        res5_head("ResNet-50-C4", stride=2, stride_in_1x1=in_1x1)[0],
    ):
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
        assert block.shortcut.stride[0] == 2


@pytest.mark.parametrize(
    ("freeze_at", "frozen"), [(0, set()), (1, {"stem"}), (2, {"stem", "res2"})]
)
def test_freeze_at(freeze_at: int, frozen: set[str]) -> None:
    backbone = meta("ResNet-50-C4", freeze_at=freeze_at)
    parts = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert parts == frozen


def test_norm_is_frozen_unless_asked() -> None:
    names = dict(meta("ResNet-18-C4").named_parameters())
    assert not any("norm" in name for name in names)
    assert "res3.0.conv1.norm.weight" in dict(meta("ResNet-18-C4", norm="BN").named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_parity_with_detectron2(training: bool, redraw: Check, assert_near: Check) -> None:
    cfg = toy_config()
    theirs = build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)).train(training)
    redraw(theirs)
    ours = build_mask_rcnn_resnet_backbone(cfg, ShapeSpec(channels=3)).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    maps, expected = ours(x), theirs(y)
    assert maps.keys() == expected.keys()
    for name in maps:
        assert_near(maps[name], expected[name], name)
    sum((m * m).mean() for m in maps.values()).backward()
    sum((m * m).mean() for m in expected.values()).backward()
    their_parameters = dict(theirs.named_parameters())
    assert their_parameters["bottom_up.res3.0.conv1.weight"].grad.abs().max() > 0
    for name, p in ours.named_parameters():
        q = their_parameters.pop(name)
        assert p.requires_grad == q.requires_grad
        if q.requires_grad:
            assert_near(p.grad, q.grad, name)
    assert not their_parameters
    assert (x.grad is None) == (y.grad is None)
    if x.grad is not None:
        assert_near(x.grad, y.grad, "image")


def test_no_fpn_without_its_features() -> None:
    cfg = config(50, "C4")
    with torch.device("meta"):
        ours = build_mask_rcnn_resnet_backbone(cfg, ShapeSpec(channels=3))
        theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert shapes(ours) == shapes(theirs)


def test_res5_head_is_detectron2s_block(redraw: Check, assert_near: Check) -> None:
    theirs, channels = Res5ROIHeads._build_res5_block(get_cfg())
    redraw(theirs)
    ours = res5_head("ResNet-50-C4", stride=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 1024, 14, 14)
    assert ours(x).shape == (2, channels, 7, 7)
    assert_near(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["ResNet-18-C4", "ResNet-50-C4"])
def test_7x7_at_stride_1_and_14x14_at_stride_2_leave_7x7(name: str) -> None:
    channels = stage_channels(name, "res5")
    for stride, side in [(1, 7), (2, 14)]:
        with torch.device("meta"):
            out = res5_head(name, stride=stride)(torch.zeros(3, channels // 2, side, side))
        assert out.shape == (3, channels, 7, 7)


@pytest.mark.parametrize(
    "name",
    [
        "ResNet-50",
        "resnet-50-FPN",
        "ResNet-51-FPN",
        "ResNet-50-C3",
        "ResNeXt-18-FPN",
        "ResNet-50-FPN-extra",
        "R50-FPN",
        "",
    ],
)
@pytest.mark.parametrize(
    "function", [resnet_backbone, res5_head, lambda name: stage_channels(name, "res5")]
)
def test_unknown_name(function: Callable[[str], object], name: str) -> None:
    with pytest.raises(ValueError, match="must be NETWORK-DEPTH-FEATURES"):
        function(name)
