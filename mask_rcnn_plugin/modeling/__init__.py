"""The models. Importing this package registers them with detectron2."""

from mask_rcnn_plugin.fast.mask_encoding import encode_masks
from mask_rcnn_plugin.fast.mask_rle import RLEMasks
from mask_rcnn_plugin.modeling.backbone import res5_head, resnet_backbone, stage_channels
from mask_rcnn_plugin.modeling.box_predictor import MaskRCNNBoxPredictor
from mask_rcnn_plugin.modeling.choices import MASK_LOSS_REGISTRY, ROI_LAYER_REGISTRY
from mask_rcnn_plugin.modeling.keypoint_head import MaskRCNNKeypointHead
from mask_rcnn_plugin.modeling.mask_head import MaskRCNNFCNHead, MaskRCNNMLPHead
from mask_rcnn_plugin.modeling.mask_loss import IndependentMasks
from mask_rcnn_plugin.modeling.meta_arch import MaskRCNN
from mask_rcnn_plugin.modeling.roi_heads import MaskRCNNC4ROIHeads, MaskRCNNROIHeads
from mask_rcnn_plugin.modeling.roi_pooling import RoIAlign, RoIPooler, RoIWarp
from mask_rcnn_plugin.modeling.rpn import (
    MaskRCNNAnchorGenerator,
    MaskRCNNRPN,
    TorchvisionAnchorGenerator,
)
from mask_rcnn_plugin.modeling.timm_backbone import timm_backbone, timm_normalization

__all__ = [
    "MASK_LOSS_REGISTRY",
    "ROI_LAYER_REGISTRY",
    "IndependentMasks",
    "MaskRCNN",
    "MaskRCNNAnchorGenerator",
    "MaskRCNNBoxPredictor",
    "MaskRCNNC4ROIHeads",
    "MaskRCNNFCNHead",
    "MaskRCNNKeypointHead",
    "MaskRCNNMLPHead",
    "MaskRCNNROIHeads",
    "MaskRCNNRPN",
    "RLEMasks",
    "RoIAlign",
    "RoIPooler",
    "RoIWarp",
    "TorchvisionAnchorGenerator",
    "encode_masks",
    "res5_head",
    "resnet_backbone",
    "stage_channels",
    "timm_backbone",
    "timm_normalization",
]
