"""The same model out of detectron2's own parts and out of torchvision's."""

import copy

from detectron2.config import instantiate
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mask_rcnn_plugin.modeling import (
    MaskRCNN,
    MaskRCNNC4ROIHeads,
    MaskRCNNFCNHead,
    MaskRCNNKeypointHead,
    MaskRCNNROIHeads,
    RoIPooler,
)
from mask_rcnn_plugin.modeling.folding import FrozenBNConv2d

# The plugin's class, detectron2's, and the arguments that detectron2's doesn't have.
_STOCK: dict[type, tuple[type, tuple[str, ...]]] = {
    MaskRCNN: (GeneralizedRCNN, ("mask_format",)),
    MaskRCNNROIHeads: (StandardROIHeads, ()),
    MaskRCNNC4ROIHeads: (Res5ROIHeads, ()),
    MaskRCNNFCNHead: (MaskRCNNConvUpsampleHead, ("loss_type",)),
    MaskRCNNKeypointHead: (KRCNNConvDeconvUpsampleHead, ()),
    RoIPooler: (ROIPooler, ("aggregation",)),
}


def stock_detectron2(model: DictConfig) -> nn.Module:
    """Build a config's model of detectron2's classes alone.

    Args:
        model: `get_config(...).model`, with RoIAlign, average, and the FCN mask branch's sigmoid
            loss: detectron2 has no others.

    Returns:
        A model with the same parameter names, whose state dict the plugin's model loads.
    """
    model = copy.deepcopy(model)
    OmegaConf.resolve(model)
    _use_stock_classes(model)
    built: nn.Module = instantiate(model)
    for conv in built.modules():
        if type(conv) is FrozenBNConv2d:
            conv.__class__ = Conv2d
    return built


def _use_stock_classes(node: DictConfig) -> None:
    if node.get("_target_") in _STOCK:
        node._target_, unknown = _STOCK[node._target_]
        for key in unknown:
            node.pop(key, None)
        if node._target_ is ROIPooler:
            node.pooler_type = {"RoIAlign": "ROIAlignV2"}[node.pooler_type]
    for child in node.values():
        if isinstance(child, DictConfig):
            _use_stock_classes(child)
