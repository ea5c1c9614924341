"""Any detectron2 model, made faster for inference."""

import copy
from typing import Any, TypeVar

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, KRCNNConvDeconvUpsampleHead
from torch import Tensor, nn

from mask_rcnn_plugin.modeling.folding import fold_batch_norm_for_inference
from mask_rcnn_plugin.modeling.roi_pooling import RoIAlign, RoIPooler
from mask_rcnn_plugin.modeling.winograd import use_winograd

Module = TypeVar("Module", bound=nn.Module)

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


def optimize_for_inference(
    model: Module,
    *,
    channels_last: bool = True,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> Module:
    """A copy of a detectron2 model that computes the same, faster.

    Batch norm is folded into the convolutions, whose weights are laid out channels-last; their
    outputs follow, from the backbone through the RoI layers to the heads. detectron2's RoIAlign
    becomes the plugin's, which computes the same. On a CPU and in float32, 3x3 convolutions of 256
    channels or more take Winograd's algorithm; their weights then take five times the memory.

    Args:
        model: any detectron2 model; unchanged.
        channels_last: lay out convolutions as (N, H, W, C) in memory.
        dtype: torch.bfloat16 or torch.float16 computes the layers in that precision, except for
            those whose outputs are boxes, class scores or keypoint logits; answers then differ by
            its rounding. None leaves the precision as it is.
        compile: compile the backbone by `torch.compile`, at the first image, for any image size.

    Returns:
        A model in evaluation mode, for inference only; its state dict is not that of `model`.

    Raises:
        ValueError: on another dtype.
    """
    if dtype is not None and dtype not in _LOW_PRECISION:
        raise ValueError(f"dtype is {dtype}, must be None or one of {_LOW_PRECISION}")
    model = copy.deepcopy(model).requires_grad_(False)
    _replace_roi_align(model)
    fold_batch_norm_for_inference(model.eval())
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if dtype is not None:
        _compute_in(model, dtype)
    elif channels_last:
        use_winograd(model)
    if compile:
        model.get_submodule("backbone").compile(dynamic=True)
    return model


def _replace_roi_align(model: nn.Module) -> None:
    for pooler in model.modules():
        if type(pooler) is not ROIPooler:
            continue
        levels: Any = pooler.level_poolers
        if all(type(level) is ROIAlign for level in levels):
            pooler.level_poolers = nn.ModuleList(
                RoIAlign(p.output_size, p.spatial_scale, p.sampling_ratio, "ave", p.aligned)
                for p in levels
            )
            pooler.__class__ = RoIPooler


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Each layer casts its input to the precision of its own weight."""

    def cast(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (args[0].to(layer.weight.dtype),)

    exact = _prediction_layers(model)
    for head in model.modules():
        if isinstance(head, StandardRPNHead):  # both of its prediction layers read these: cast once
            head.conv.register_forward_hook(lambda _, args, features: features.float())
    for layer in model.modules():
        if isinstance(layer, _LAYERS):
            layer.register_forward_pre_hook(cast)
            if layer not in exact:
                layer.to(dtype)


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
