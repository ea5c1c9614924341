"""detectron2's own RPN, sampling, box predictor and keypoint head in place of the plugin's.

    python train.py --config-file table2a_backbone/r50_fpn+stock

For comparing: the same model and weights, with all that the plugin's classes save a GPU in waits
and operators. Backbone, poolers and mask branch stay the plugin's.
"""

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    KRCNNConvDeconvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from omegaconf import DictConfig


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    cfg.model.proposal_generator._target_ = RPN
    cfg.model.proposal_generator.anchor_generator._target_ = DefaultAnchorGenerator
    heads = cfg.model.roi_heads
    heads._target_ = StandardROIHeads if "box_pooler" in heads else Res5ROIHeads
    heads.box_predictor._target_ = FastRCNNOutputLayers
    if "keypoint_head" in heads:
        heads.keypoint_head._target_ = KRCNNConvDeconvUpsampleHead
        cfg.train.channels_last = False  # its loss takes a view that channels-last lacks
