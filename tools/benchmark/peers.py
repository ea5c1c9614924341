"""The same model out of detectron2's own parts and out of torchvision's."""

import copy
from typing import Any

from detectron2.config import instantiate
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from mask_rcnn_plugin.fast.folding import FrozenBNConv2d
from mask_rcnn_plugin.fast.replacement import as_class, conv_like, replace_modules
from mask_rcnn_plugin.modeling import (
    MaskRCNN,
    MaskRCNNAnchorGenerator,
    MaskRCNNBoxPredictor,
    MaskRCNNC4ROIHeads,
    MaskRCNNFCNHead,
    MaskRCNNKeypointHead,
    MaskRCNNROIHeads,
    MaskRCNNRPN,
    RoIPooler,
)
from mask_rcnn_plugin.weights.torchvision import to_torchvision

# The plugin's class, detectron2's, and the arguments that detectron2's doesn't have.
_STOCK: dict[type, tuple[type, tuple[str, ...]]] = {
    MaskRCNN: (GeneralizedRCNN, ("mask_format",)),
    MaskRCNNROIHeads: (StandardROIHeads, ()),
    MaskRCNNC4ROIHeads: (Res5ROIHeads, ()),
    MaskRCNNFCNHead: (MaskRCNNConvUpsampleHead, ("loss_type",)),
    MaskRCNNKeypointHead: (KRCNNConvDeconvUpsampleHead, ()),
    MaskRCNNAnchorGenerator: (DefaultAnchorGenerator, ()),
    MaskRCNNRPN: (RPN, ()),
    MaskRCNNBoxPredictor: (FastRCNNOutputLayers, ()),
    RoIPooler: (ROIPooler, ("aggregation",)),
}


def stock_detectron2(model: DictConfig) -> Any:
    """Build a config's model of detectron2's classes alone.

    Args:
        model: `get_config(...).model`, with RoIAlign, average, and the FCN mask branch's sigmoid
            loss: detectron2 has no others. Parameters have the same names.
    """
    model = copy.deepcopy(model)
    OmegaConf.resolve(model)
    _use_stock_classes(model)
    return replace_modules(instantiate(model), _unfolded)


def with_stock(model: nn.Module, *kinds: type) -> Any:
    """A copy of a plugin's model whose modules of some classes are detectron2's.

    Args:
        model: with the features that `stock_detectron2` asks for.
        kinds: of the plugin's classes.
    """

    def stock(module: nn.Module) -> nn.Module | None:
        if type(module) not in kinds:
            return None
        return _unfolded(module) or as_class(module, _STOCK[type(module)][0])

    return replace_modules(copy.deepcopy(model), stock)


def _unfolded(conv: nn.Module) -> Conv2d | None:
    return conv_like(conv, Conv2d, conv.norm) if type(conv) is FrozenBNConv2d else None


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


def torchvision_twin(stock: Any, num_detections: int, shorter_side: int) -> Any:
    """torchvision's Mask R-CNN, ResNet-50-FPN, with the weights of detectron2's.

    It is the same network but for details of the anchors and of the first version of RoIAlign,
    half a cell off, which it uses: as much work, other boxes.

    Args:
        stock: from `stock_detectron2`, with the stride in the 3x3 convolutions.
        num_detections: most detections an image.
        shorter_side: of the images that it will get, in pixels; it resizes others. They are BGR
            (3, H, W), float in [0, 255].
    """
    predictor = stock.roi_heads.box_predictor
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d
    )
    twin = TorchvisionMaskRCNN(
        backbone,
        num_classes=predictor.num_classes + 1,
        min_size=shorter_side,
        max_size=10**6,
        image_mean=stock.pixel_mean.flatten().tolist(),
        image_std=stock.pixel_std.flatten().tolist(),
        rpn_pre_nms_top_n_test=stock.proposal_generator.pre_nms_topk[False],
        rpn_post_nms_top_n_test=stock.proposal_generator.post_nms_topk[False],
        box_score_thresh=predictor.test_score_thresh,
        box_detections_per_img=num_detections,
    )
    twin.load_state_dict(to_torchvision(stock.state_dict()))
    return twin
