"""Backbones by the paper's names, "network-depth-features" (Sec. 3, Network Architecture).

ResNet-50-C4, ResNet-101-FPN, ResNeXt-101-FPN, ResNet-50-C5, ... Both front ends end in
detectron2's own builders, so the two give equal models and detectron2's checkpoints load.
"""

import re
from typing import NamedTuple

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BottleneckBlock,
    ResNet,
    build_resnet_backbone,
)
from torch import nn

# Groups x width of the 3x3 convolutions in res2: Table 2a's ResNeXt-101 is the 64x4d model.
_GROUPS = {"ResNet": (1, 64), "ResNeXt": (64, 4)}
_DEPTHS = (18, 34, 50, 101, 152)
_FEATURES = {"C4": ["res4"], "C5": ["res5"], "FPN": ["res2", "res3", "res4", "res5"]}
# ResNet-18 and -34 are made of two 3x3 convolutions a block, the deeper ones of bottlenecks.
_BASIC_DEPTHS = (18, 34)
_RES5_BLOCKS = {18: 2, 34: 3, 50: 3, 101: 3, 152: 3}


class BackboneName(NamedTuple):
    """A parsed "network-depth-features"."""

    network: str
    depth: int
    features: str

    @classmethod
    def parse(cls, name: str) -> "BackboneName":
        """
        Raises:
            ValueError: if the name is not of the form, or one of its parts is unknown.
        """
        match = re.fullmatch(r"(\w+)-(\d+)-(\w+)", name)
        if match:
            parsed = cls(match[1], int(match[2]), match[3])
            if (
                parsed.network in _GROUPS
                and parsed.depth in _DEPTHS
                and parsed.features in _FEATURES
                and not (parsed.network == "ResNeXt" and parsed.depth in _BASIC_DEPTHS)
            ):
                return parsed
        raise ValueError(
            f"backbone name is {name!r}, must be NETWORK-DEPTH-FEATURES with NETWORK one of "
            f"{list(_GROUPS)}, DEPTH one of {list(_DEPTHS)} (ResNeXt: from 50), FEATURES one of "
            f"{list(_FEATURES)}, e.g. 'ResNet-50-FPN'"
        )

    def stage_channels(self, stage: str) -> int:
        """Output channels of "res2" ... "res5"."""
        res2 = 64 if self.depth in _BASIC_DEPTHS else 256
        return res2 * 2 ** (int(stage[-1]) - 2)


def backbone_channels(name: str, fpn_channels: int = 256) -> int:
    """Channels of the feature maps that a backbone hands to the RPN and the RoI heads.

    For configs, which need the number before there is a model.
    """
    parsed = BackboneName.parse(name)
    if parsed.features == "FPN":
        return fpn_channels
    return parsed.stage_channels(_FEATURES[parsed.features][0])


def res5_channels(name: str) -> int:
    """Channels of res5's output: what the C4 heads predict from."""
    return BackboneName.parse(name).stage_channels("res5")


def resnet_backbone(
    name: str,
    *,
    freeze_at: int = 2,
    norm: str = "FrozenBN",
    stride_in_1x1: bool = True,
    fpn_channels: int = 256,
    fpn_norm: str = "",
) -> Backbone:
    """A backbone by name, for LazyConfig.

    Args:
        name: "network-depth-features", e.g. "ResNet-50-FPN", "ResNeXt-101-FPN", "ResNet-101-C4".
        freeze_at: how many stages stay as they were loaded; 2 = stem and res2, 0 = none.
        norm: normalisation of the convolutions, as `detectron2.layers.get_norm` takes it. The paper
            fine-tunes with frozen batch normalisation.
        stride_in_1x1: where a bottleneck that halves the resolution has its stride: in the first
            1x1 convolution for the original MSRA weights (the paper's ResNets), in the 3x3 for
            Facebook's ResNeXt and torchvision's weights.
        fpn_channels: output channels of the FPN; not read for C4 and C5.
        fpn_norm: normalisation inside the FPN; not read for C4 and C5.

    Returns:
        detectron2 backbone, called with images (N, 3, H, W). Its feature maps:
        C4 {"res4": stride 16}, C5 {"res5": stride 32}, FPN {"p2" ... "p6": strides 4 ... 64}.

    Raises:
        ValueError: on an unknown name.
    """
    parsed = BackboneName.parse(name)
    cfg = get_cfg()
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH = parsed.depth
    resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = _GROUPS[parsed.network]
    resnets.OUT_FEATURES = _FEATURES[parsed.features]
    resnets.RES2_OUT_CHANNELS = parsed.stage_channels("res2")
    resnets.NORM = norm
    resnets.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    if parsed.features == "FPN":
        cfg.MODEL.FPN.IN_FEATURES = _FEATURES["FPN"]
        cfg.MODEL.FPN.OUT_CHANNELS = fpn_channels
        cfg.MODEL.FPN.NORM = fpn_norm
    return build_mask_rcnn_resnet_backbone(cfg, ShapeSpec(channels=3))


@BACKBONE_REGISTRY.register()
def build_mask_rcnn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A backbone from detectron2's keys, for YAML.

    An FPN over MODEL.FPN.IN_FEATURES if there are any, else the plain ResNet that ends at
    MODEL.RESNETS.OUT_FEATURES (["res4"] for C4, ["res5"] for C5).

    Args:
        cfg: detectron2 config; MODEL.RESNETS, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT are read.
        input_shape: channels of the image.
    """
    if cfg.MODEL.FPN.IN_FEATURES:
        return build_resnet_fpn_backbone(cfg, input_shape)
    return build_resnet_backbone(cfg, input_shape)


def res5_head(
    name: str, *, stride: int = 1, norm: str = "FrozenBN", stride_in_1x1: bool = True
) -> nn.Sequential:
    """The fifth stage of a ResNet as a head on RoI features, for C4 (Fig. 4, left).

    Args:
        name: the backbone's name, e.g. "ResNet-50-C4".
        stride: 1 on RoI features of 7 x 7 as in the paper, 2 on 14 x 14 as in detectron2's zoo;
            either way 7 x 7 come out.
        norm, stride_in_1x1: as in `resnet_backbone`.

    Returns:
        (R, C4 channels, P, P) -> (R, C5 channels, P / stride, P / stride), with the parameter names
        of detectron2's `Res5ROIHeads.res5`.

    Raises:
        ValueError: on an unknown name.
    """
    parsed = BackboneName.parse(name)
    num_groups, width_per_group = _GROUPS[parsed.network]
    return make_res5(
        parsed.depth,
        out_channels=parsed.stage_channels("res5"),
        bottleneck_channels=num_groups * width_per_group * 8,
        num_groups=num_groups,
        stride=stride,
        norm=norm,
        stride_in_1x1=stride_in_1x1,
    )


def make_res5(
    depth: int,
    *,
    out_channels: int,
    bottleneck_channels: int,
    num_groups: int,
    stride: int,
    norm: str,
    stride_in_1x1: bool,
) -> nn.Sequential:
    """`res5_head` by its numbers."""
    num_blocks = _RES5_BLOCKS[depth]
    if depth in _BASIC_DEPTHS:
        block, extra = BasicBlock, {}
    else:
        block = BottleneckBlock
        extra = {
            "bottleneck_channels": bottleneck_channels,
            "num_groups": num_groups,
            "stride_in_1x1": stride_in_1x1,
        }
    blocks = ResNet.make_stage(
        block,
        num_blocks,
        stride_per_block=[stride] + [1] * (num_blocks - 1),
        in_channels=out_channels // 2,
        out_channels=out_channels,
        norm=norm,
        **extra,
    )
    return nn.Sequential(*blocks)
