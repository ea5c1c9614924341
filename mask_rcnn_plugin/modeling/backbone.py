"""Backbones by the paper's names, "network-depth-features" (Sec. 3, Network Architecture).

ResNet-50-C4, ResNet-101-FPN, ResNeXt-101-FPN, ResNet-50-C5, ... Made of detectron2's own blocks and
with its parameter names, so that its checkpoints, and ImageNet weights, load. Frozen batch norm is
part of the convolution before it.
"""

import re
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    CNNBlockBase,
    ResNet,
    build_resnet_backbone,
)
from torch import nn

from mask_rcnn_plugin.fast.folding import fold_frozen_batch_norm
from mask_rcnn_plugin.modeling.yaml_keys import warn_of_ignored_keys

Norm = str | Callable[[int], nn.Module]  # of so many channels, as `get_norm` takes it

# Groups, and channels of a group, of the 3x3 convolutions in res2: Table 2a's ResNeXt-101 is the
# 64x4d model.
_GROUPS = {"ResNet": (1, 64), "ResNeXt": (64, 4)}
_BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_STAGES = ("res2", "res3", "res4", "res5")
_FEATURES = {"C4": ("res4",), "C5": ("res5",), "FPN": _STAGES}


def _parse(name: str) -> tuple[str, int, str]:
    """Network, depth and features; a ValueError if the name has another form or unknown parts."""
    match = re.fullmatch(r"(ResNet|ResNeXt)-(\d+)-(C4|C5|FPN)", name)
    if match and (depth := int(match[2])) in _BLOCKS and (match[1] == "ResNet" or depth >= 50):
        return match[1], depth, match[3]
    raise ValueError(
        f"backbone name is {name!r}, must be NETWORK-DEPTH-FEATURES with NETWORK one of "
        f"{list(_GROUPS)}, DEPTH one of {list(_BLOCKS)} (ResNeXt: from 50), FEATURES one of "
        f"{list(_FEATURES)}, e.g. 'ResNet-50-FPN'"
    )


def stage_channels(name: str, stage: str, width: int = 64) -> int:
    """Output channels of "res2" ... "res5", for configs, which need them before the model."""
    res2 = width if _parse(name)[1] < 50 else 4 * width  # basic blocks, or bottlenecks
    return res2 * 2 ** _STAGES.index(stage)


def resnet_backbone(
    name: str,
    *,
    width: int = 64,
    freeze_at: int = 2,
    norm: Norm = "FrozenBN",
    stride_in_1x1: bool = True,
    fpn_channels: int = 256,
    fpn_norm: Norm = "",
) -> Backbone:
    """A backbone by name, for LazyConfig.

    Args:
        name: "network-depth-features", e.g. "ResNet-50-FPN", "ResNeXt-101-FPN", "ResNet-101-C4".
        width: channels of the stem, by which all others scale. 64 is the paper's; fewer make
            a network for a CPU.
        freeze_at: how many stages stay as they were loaded; 2 = stem and res2, 0 = none.
        norm: normalisation of the convolutions, as `detectron2.layers.get_norm` takes it. The paper
            fine-tunes with frozen batch normalisation.
        stride_in_1x1: where a bottleneck that halves the resolution has its stride: in the first
            1x1 convolution for the original MSRA weights (the paper's ResNets), in the 3x3 for
            Facebook's ResNeXt and torchvision's weights.
        fpn_channels: output channels of the FPN; ignored for C4 and C5.
        fpn_norm: normalisation inside the FPN; ignored for C4 and C5.

    Returns:
        detectron2 backbone, called with images (N, 3, H, W). Its feature maps:
        C4 {"res4": stride 16}, C5 {"res5": stride 32}, FPN {"p2" ... "p6": strides 4 ... 64}.

    Raises:
        ValueError: on an unknown name.
    """
    features = _parse(name)[2]
    stages = [
        make_stage(name, stage, 1 if stage == "res2" else 2, width, norm, stride_in_1x1)
        for stage in _STAGES
    ]
    resnet = fold_frozen_batch_norm(
        ResNet(
            BasicStem(out_channels=width, norm=norm),
            stages,
            out_features=list(_FEATURES[features]),
            freeze_at=freeze_at,
        )
    )
    if features != "FPN":
        return resnet
    return FPN(resnet, _STAGES, fpn_channels, norm=fpn_norm, top_block=LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_mask_rcnn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A backbone from detectron2's keys, for YAML.

    An FPN over MODEL.FPN.IN_FEATURES if there are any, else the plain ResNet that ends at
    MODEL.RESNETS.OUT_FEATURES (["res4"] for C4, ["res5"] for C5).

    Args:
        cfg: detectron2 config; MODEL.RESNETS, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT are read.
        input_shape: channels of the image.
    """
    warn_of_ignored_keys(cfg, "BACKBONE.NAME")
    build = build_resnet_fpn_backbone if cfg.MODEL.FPN.IN_FEATURES else build_resnet_backbone
    return fold_frozen_batch_norm(build(cfg, input_shape))


def res5_head(
    name: str,
    *,
    stride: int = 1,
    width: int = 64,
    norm: Norm = "FrozenBN",
    stride_in_1x1: bool = True,
) -> nn.Sequential:
    """The fifth stage of a ResNet as a head on RoI features, for C4 (Fig. 4, left).

    Args:
        name: the backbone's name, e.g. "ResNet-50-C4".
        stride: 1 on RoI features of 7 x 7 as in the paper, 2 on 14 x 14 as in detectron2's zoo;
            either way 7 x 7 come out.
        width, norm, stride_in_1x1: as in `resnet_backbone`.

    Returns:
        (R, C4 channels, P, P) -> (R, C5 channels, P / stride, P / stride), with the parameter names
        of detectron2's `Res5ROIHeads.res5`.

    Raises:
        ValueError: on an unknown name.
    """
    stage = nn.Sequential(*make_stage(name, "res5", stride, width, norm, stride_in_1x1))
    return fold_frozen_batch_norm(stage)


def make_stage(
    name: str, stage: str, stride: int, width: int, norm: Norm, stride_in_1x1: bool
) -> list[CNNBlockBase]:
    """The blocks of "res2" ... "res5" of a network; arguments as in `resnet_backbone`."""
    network, depth, _ = _parse(name)
    index = _STAGES.index(stage)
    num_blocks = _BLOCKS[depth][index]
    block, extra = BasicBlock, {}
    if depth >= 50:
        groups, group_width = _GROUPS[network]
        block = BottleneckBlock
        extra = {
            "bottleneck_channels": groups * group_width * width // 64 * 2**index,
            "num_groups": groups,
            "stride_in_1x1": stride_in_1x1,
        }
    return ResNet.make_stage(
        block,
        num_blocks,
        stride_per_block=[stride] + [1] * (num_blocks - 1),
        in_channels=stage_channels(name, _STAGES[index - 1], width) if index else width,
        out_channels=stage_channels(name, stage, width),
        norm=norm,
        **extra,
    )
