"""Random weights under which a network behaves as a trained one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import CNNBlockBase
from torch import Tensor, nn

# Standard deviations of a prediction layer's outputs, roughly those of COCO's models.
_SPREADS = {
    "proposal_generator.rpn_head.objectness_logits": 3.0,
    "proposal_generator.rpn_head.anchor_deltas": 0.3,
    "roi_heads.box_predictor.cls_score": 2.5,
    "roi_heads.box_predictor.bbox_pred": 2.0,
    "roi_heads.mask_head.predictor": 3.0,
    "roi_heads.keypoint_head.score_lowres": 3.0,
}


def draw_like_trained(model: nn.Module, batch: list[dict[str, Any]], num_candidates: int) -> None:
    """Draw a model's weights anew, and fit their scales to a batch.

    At initialisation all boxes are anchors and all scores equal; with weights drawn larger, fifty
    layers blow up any rounding. Here batch norm has the statistics of the batch, residual branches
    add a fifth, and the prediction layers' outputs have the spread of a trained network's.

    Args:
        model: of detectron2's classes, as from `stock_detectron2`.
        batch: images as the model takes them.
        num_candidates: how many class scores of the batch are to pass the score threshold, which
            is set to that; a trained model on COCO has a few hundred an image. All, if there are
            fewer.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gain = 2 if parameter.dim() == 4 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * (gain / parameter[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            parameter.data.zero_()

    predictor: Any = model.get_submodule("roi_heads.box_predictor")
    # Random scores favour small anchors, so boxes are three times their proposals (by dw, dh / 5).
    predictor.bbox_pred.bias.data.view(-1, 4)[:, 2:] = 5 * math.log(3)

    handles = [
        module.register_forward_pre_hook(_take_statistics)
        for module in model.modules()
        if isinstance(module, FrozenBatchNorm2d)
    ]
    layers = dict(model.named_modules())
    handles += [
        layers[name].register_forward_hook(_rescaling(spread))
        for name, spread in _SPREADS.items()
        if name in layers
    ]
    for block in model.modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "shortcut"):
            convs = [c for n, c in block.named_children() if n.startswith("conv")]
            convs[-1].norm.weight.data.fill_(0.2)

    logits: list[Tensor] = []
    handles.append(predictor.register_forward_hook(lambda _, __, output: logits.append(output[0])))
    model.eval()
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    scores = logits[0].softmax(dim=1)[:, :-1].flatten()
    predictor.test_score_thresh = float(scores.topk(min(num_candidates, len(scores))).values[-1])


def _take_statistics(norm: Any, args: tuple[Tensor]) -> None:
    variance, mean = torch.var_mean(args[0], dim=(0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance + 1e-3)


def _rescaling(spread: float) -> Callable[..., Tensor | None]:
    """A hook that scales a layer's weight at its first call so that its outputs spread so far."""
    scaled = []

    def hook(layer: Any, args: Any, output: Tensor) -> Tensor | None:
        if scaled or output.numel() < 2:
            return None
        scaled.append(layer)
        layer.weight.data.mul_(spread / output.std())
        return layer(*args)

    return hook
