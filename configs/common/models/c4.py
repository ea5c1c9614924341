"""Mask R-CNN on C4 features (Fig. 4, left): box and mask branches on a shared res5."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig

from mask_rcnn_plugin.modeling import (
    MaskRCNN,
    MaskRCNNC4ROIHeads,
    MaskRCNNFCNHead,
    RoIPooler,
    res5_head,
    resnet_backbone,
    stage_channels,
)

from .parts import box_predictor, pixel_mean, pixel_std, proposal_matcher, rpn


def _res5_shape() -> DictConfig:
    return L(ShapeSpec)(
        channels=L(stage_channels)(
            name="${.....backbone.name}", stage="res5", width="${.....backbone.width}"
        )
    )


model = L(MaskRCNN)(
    backbone=L(resnet_backbone)(
        name="ResNet-50-C4", width=64, freeze_at=2, norm="FrozenBN", stride_in_1x1=True
    ),
    proposal_generator=rpn,
    roi_heads=L(MaskRCNNC4ROIHeads)(
        num_classes=80,
        batch_size_per_image=64,  # Sec. 3.1; detectron2's zoo samples 512
        positive_fraction=0.25,
        proposal_matcher=proposal_matcher,
        in_features=["res4"],
        pooler=L(RoIPooler)(
            output_size=7,
            scales=[1 / 16],
            sampling_ratio=2,
            pooler_type="RoIAlign",
            aggregation="ave",
        ),
        res5=L(res5_head)(
            name="${...backbone.name}",
            stride=1,
            width="${...backbone.width}",
            norm="${...backbone.norm}",
            stride_in_1x1="${...backbone.stride_in_1x1}",
        ),
        box_predictor=box_predictor,
        mask_head=L(MaskRCNNFCNHead)(
            input_shape=_res5_shape(),
            num_classes="${..num_classes}",
            conv_dims=[256],
            loss_type="sigmoid",
        ),
    ),
    pixel_mean=pixel_mean,
    pixel_std=pixel_std,
    input_format="BGR",
    mask_format="rle",
)
model.roi_heads.box_predictor.input_shape = _res5_shape()
model.proposal_generator.in_features = ["res4"]
model.proposal_generator.head.in_channels = L(stage_channels)(
    name="${....backbone.name}", stage="res4", width="${....backbone.width}"
)
model.proposal_generator.anchor_generator.strides = [16]
