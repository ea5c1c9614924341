"""Any detectron2 model, made faster for inference."""

import copy
from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, KRCNNConvDeconvUpsampleHead
from torch import Tensor, nn

from mask_rcnn_plugin.fast.folding import fold_batch_norm_for_inference
from mask_rcnn_plugin.fast.replacement import Module, replace_modules
from mask_rcnn_plugin.fast.winograd import use_winograd
from mask_rcnn_plugin.modeling.roi_pooling import RoIPooler

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


def optimize_for_inference(
    model: Module,
    *,
    channels_last: bool | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> Module:
    """A copy of a detectron2 model that computes the same, faster.

    Batch norm is folded into the convolutions, whose weights are laid out channels-last on a CPU;
    their outputs follow, from the backbone through the RoI layers to the heads. detectron2's
    RoIAlign becomes the plugin's, which computes the same. On a CPU and in float32, 3x3
    convolutions of 256 channels or more take Winograd's algorithm; their weights then take five
    times the memory.

    Args:
        model: any detectron2 model; unchanged.
        channels_last: lay out convolutions as (N, H, W, C) in memory; None: on a CPU alone.
        dtype: torch.bfloat16 or torch.float16 computes backbone, RPN and RoI heads in that
            precision, except for the layers whose outputs are boxes, class scores or keypoint
            logits; outputs then differ by rounding. For a `GeneralizedRCNN` on a ResNet, with
            an FPN or without. None leaves the precision as it is.
        compile: compile `model.backbone` by `torch.compile`, at the first image, for any image
            size. A copy of the returned model is not compiled.

    Returns:
        A model in evaluation mode, for inference only; its state dict is not that of `model`.

    Raises:
        ValueError: on another dtype, or a model that `dtype` or `compile` doesn't support.
    """
    if dtype is not None and dtype not in _LOW_PRECISION:
        raise ValueError(f"dtype is {dtype}, must be None or one of {_LOW_PRECISION}")
    if dtype is not None and not (
        isinstance(model, GeneralizedRCNN) and _is_resnet(model.backbone)
    ):
        raise ValueError(
            f"dtype is {dtype} for a {type(model).__name__}: must be None except for a "
            "GeneralizedRCNN on a ResNet, with an FPN or without"
        )
    if compile and not hasattr(model, "backbone"):
        raise ValueError(
            f"compile is True, but a {type(model).__name__} has no backbone: give the model "
            "itself, not a wrapper"
        )
    if channels_last is None:
        channels_last = all(parameter.device.type == "cpu" for parameter in model.parameters())
    model = copy.deepcopy(model).requires_grad_(False)
    model = replace_modules(model, _fast_pooler)
    model = fold_batch_norm_for_inference(model.eval())
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if dtype is not None:
        _compute_in(model, dtype)
    elif channels_last:
        model = use_winograd(model)
    if compile:
        model.get_submodule("backbone").compile(dynamic=True)
    return model


def _fast_pooler(pooler: Any) -> RoIPooler | None:
    """The plugin's pooler in the place of detectron2's, if that has RoIAlign."""
    if type(pooler) is not ROIPooler:
        return None
    levels = pooler.level_poolers
    if any(type(level) is not ROIAlign for level in levels):
        return None
    return RoIPooler(
        pooler.output_size,
        [level.spatial_scale for level in levels],
        levels[0].sampling_ratio,
        "ROIAlignV2" if levels[0].aligned else "ROIAlign",
        pooler.canonical_box_size,
        pooler.canonical_level,
    )


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Backbone, RPN and RoI heads in `dtype`; each layer casts its input to its own precision."""
    exact = _prediction_layers(model)
    for head in model.modules():
        if isinstance(head, StandardRPNHead):  # both of its prediction layers read these: cast once
            head.conv.register_forward_hook(_to_float32)
    converted = {
        layer
        for part in ("backbone", "proposal_generator", "roi_heads")
        for layer in (getattr(model, part) or nn.Identity()).modules()
        if isinstance(layer, _LAYERS) and layer not in exact
    }
    for layer in model.modules():
        if isinstance(layer, _LAYERS):
            layer.register_forward_pre_hook(_to_own_dtype)
            if layer in converted:
                layer.to(dtype)


def _to_own_dtype(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: Any = layer.weight
    return (args[0].to(weight.dtype), *args[1:])


def _to_float32(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


def _is_resnet(backbone: nn.Module) -> bool:
    return isinstance(backbone.bottom_up if isinstance(backbone, FPN) else backbone, ResNet)


def _prediction_layers(model: nn.Module) -> set[nn.Module]:
    """Layers whose outputs are compared with each other or are coordinates, where 8 bits would make
    ties and jumps. They cost little."""
    layers: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FastRCNNOutputLayers):
            layers.update(module.modules())
        elif isinstance(module, StandardRPNHead):
            layers.update((module.objectness_logits, module.anchor_deltas))
        elif isinstance(module, KRCNNConvDeconvUpsampleHead):
            layers.add(module.score_lowres)
    return layers
