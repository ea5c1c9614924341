"""The same model out of detectron2's own parts and out of torchvision's."""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
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


# detectron2's parameter names, as regular expressions, and what stands for them in torchvision's.
_TORCHVISION_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^backbone\.fpn_lateral(\d)", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0"),
    (r"^backbone\.fpn_output(\d)", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0"),
    (r"^backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.bn1"),
    (r"^backbone\.bottom_up\.stem", "backbone.body"),
    (r"^backbone\.bottom_up\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}"),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"^proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits", "rpn.head.cls_logits"),
    (r"^proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.bbox_pred"),
    (r"box_head\.fc(\d)", lambda m: f"box_head.fc{int(m[1]) + 5}"),
    (r"mask_head\.mask_fcn(\d)", lambda m: f"mask_head.{int(m[1]) - 1}.0"),
    (r"mask_head\.deconv", "mask_predictor.conv5_mask"),
    (r"mask_head\.predictor", "mask_predictor.mask_fcn_logits"),
]


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
    state = twin.state_dict()
    for name, value in stock.state_dict().items():
        for pattern, replacement in _TORCHVISION_NAMES:
            name = re.sub(pattern, replacement, name)
        # Background comes first, not last.
        if "cls_score" in name:
            value = value.roll(1, dims=0)
        elif "roi_heads.box_predictor.bbox_pred" in name:
            value = torch.cat([torch.zeros_like(value[:4]), value])
        elif "mask_fcn_logits" in name:
            value = torch.cat([torch.zeros_like(value[:1]), value])
        state[name] = value
    twin.load_state_dict(state)
    return twin
