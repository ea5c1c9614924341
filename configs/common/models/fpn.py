"""Faster R-CNN on an FPN with RoIAlign, and the branches that make it Mask R-CNN (Fig. 4)."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from omegaconf import DictConfig

from mask_rcnn_plugin.modeling import (
    MaskRCNN,
    MaskRCNNFCNHead,
    MaskRCNNKeypointHead,
    MaskRCNNROIHeads,
    RoIPooler,
    resnet_backbone,
)

from .parts import box_predictor, pixel_mean, pixel_std, proposal_matcher, rpn

_levels = ["p2", "p3", "p4", "p5"]


def _pooler(output_size: int) -> DictConfig:
    return L(RoIPooler)(
        output_size=output_size,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=2,  # 4 points a bin (Sec. 3)
        pooler_type="RoIAlign",
        aggregation="ave",
    )


def _input_shape(branch: str) -> DictConfig:
    return L(ShapeSpec)(
        channels="${....backbone.fpn_channels}",
        height=f"${{...{branch}_pooler.output_size}}",
        width=f"${{...{branch}_pooler.output_size}}",
    )


model = L(MaskRCNN)(
    backbone=L(resnet_backbone)(
        name="ResNet-50-FPN",
        width=64,
        freeze_at=2,
        norm="FrozenBN",
        stride_in_1x1=True,
        fpn_channels=256,
        fpn_norm="",
    ),
    proposal_generator=rpn,
    roi_heads=L(MaskRCNNROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=proposal_matcher,
        box_in_features=_levels,
        box_pooler=_pooler(7),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=_input_shape("box"),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=box_predictor,
    ),
    pixel_mean=pixel_mean,
    pixel_std=pixel_std,
    input_format="BGR",
    mask_format="rle",
)
model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels="${...box_head.fc_dims[-1]}")

# One scale a level, five levels.
model.proposal_generator.in_features = [*_levels, "p6"]
model.proposal_generator.head.in_channels = "${...backbone.fpn_channels}"
model.proposal_generator.head.num_anchors = 3
model.proposal_generator.anchor_generator.sizes = [[32], [64], [128], [256], [512]]
model.proposal_generator.anchor_generator.strides = [4, 8, 16, 32, 64]
model.proposal_generator.pre_nms_topk = (2000, 1000)
model.proposal_generator.post_nms_topk = (1000, 1000)


def add_mask_branch(model: DictConfig) -> None:
    """Four 3x3 convolutions and a deconvolution on 14 x 14 RoI features (Fig. 4, right)."""
    model.roi_heads.update(
        mask_in_features=_levels,
        mask_pooler=_pooler(14),
        mask_head=L(MaskRCNNFCNHead)(
            input_shape=_input_shape("mask"),
            num_classes="${..num_classes}",
            conv_dims=[256, 256, 256, 256, 256],
            loss_type="sigmoid",
        ),
    )


def add_keypoint_branch(model: DictConfig) -> None:
    """Eight 3x3 convolutions of 512 channels on 14 x 14 RoI features (Sec. 5)."""
    model.roi_heads.update(
        keypoint_in_features=_levels,
        keypoint_pooler=_pooler(14),
        keypoint_head=L(MaskRCNNKeypointHead)(
            input_shape=_input_shape("keypoint"),
            num_keypoints=17,
            conv_dims=[512] * 8,
            loss_normalizer="visible",
        ),
    )
