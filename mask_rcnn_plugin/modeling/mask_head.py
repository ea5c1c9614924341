"""Mask branches: the FCN of Fig. 4 and the MLP of Table 2e."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from fvcore.nn import weight_init
from torch import Tensor, nn

from mask_rcnn_plugin.modeling.mask_loss import (
    mask_targets,
    sigmoid_mask_loss,
    softmax_mask_loss,
    softmax_mask_probs,
)
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config

LOSS_TYPES = ("sigmoid", "softmax")


def num_mask_maps(num_classes: int, loss_type: str) -> int:
    """Output channels of a mask branch: K, and one more for background under the softmax loss.

    Raises:
        ValueError: if `loss_type` is not one of `LOSS_TYPES`.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}, must be one of {LOSS_TYPES}")
    return num_classes + (loss_type == "softmax")


class MaskBranch(BaseMaskRCNNHead):
    """Loss and inference of any mask branch. A subclass gives the layers:

    * `features(x)`: what goes into the predictor;
    * `all_logits(features)`: (R, num_maps, M, M);
    * `class_logits(features, classes)`: (R, M, M), the map of each RoI's class. With the sigmoid
      loss a mask depends on its own class alone (Sec. 3), so the others need not be computed.

    and the attributes `num_classes` (K, or 1 if class-agnostic) and `loss_type`.
    """

    num_classes: int
    loss_type: str

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def all_logits(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def class_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        raise NotImplementedError

    def layers(self, x: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            x: (R, C, P, P), pooled RoI features.

        Returns:
            (R, K, M, M); (R, K + 1, M, M) with background last under the softmax loss.
        """
        return self.all_logits(self.features(x))

    def forward(self, x: Tensor, instances: list[Instances]) -> Any:
        """
        Args:
            x: (R, C, P, P), pooled features of the RoIs in `instances`, in their order. In
                training these are the positive RoIs only, in inference the detections.
            instances: one for each image; in training with `proposal_boxes`, `gt_classes` and
                `gt_masks`, in inference with `pred_classes`.

        Returns:
            Training: {"loss_mask": scalar}, L_mask of Sec. 3.
            Inference: `instances`, each with `pred_masks`, (its R, 1, M, M) probabilities of its
            predicted class.
        """
        features = self.features(x)
        if self.training:
            return {"loss_mask": self.loss_weight * self._loss(features, instances)}
        classes = self._mask_classes([i.pred_classes for i in instances])
        if self.loss_type == "sigmoid":
            probs = self.class_logits(features, classes).sigmoid()
        else:
            probs = softmax_mask_probs(self.all_logits(features), classes)
        for per_image, i in zip(probs[:, None].split([len(i) for i in instances]), instances):
            i.pred_masks = per_image
        return instances

    def _loss(self, features: Tensor, instances: list[Instances]) -> Tensor:
        # Images without a positive RoI have no gt_masks at all.
        instances = [i for i in instances if len(i) > 0]
        if not instances:
            # Ties the loss to every parameter of the branch, as distributed training wants.
            return self.all_logits(features).sum() * 0
        classes = self._mask_classes([i.gt_classes for i in instances])
        if self.loss_type == "sigmoid":
            logits = self.class_logits(features, classes)
        else:
            logits = self.all_logits(features)
        targets = cat(
            [mask_targets(i.gt_masks, i.proposal_boxes.tensor, logits.shape[-1]) for i in instances]
        )
        if self.loss_type == "sigmoid":
            return sigmoid_mask_loss(logits, targets)
        return softmax_mask_loss(logits, targets, classes)

    def _mask_classes(self, classes: list[Tensor]) -> Tensor:
        """Which map belongs to each RoI: its class's, or the only one if class-agnostic."""
        flat = cat(classes).to(torch.int64)
        return torch.zeros_like(flat) if self.num_classes == 1 else flat


def _mask_branch_config(cfg: CfgNode) -> dict[str, Any]:
    require_mask_rcnn_config(cfg)
    head = cfg.MODEL.ROI_MASK_HEAD
    return {
        "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "loss_type": head.LOSS_TYPE,
    }


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNFCNHead(MaskBranch, MaskRCNNConvUpsampleHead):
    """The FCN mask branch (Fig. 4): 3x3 convolutions, a 2x2 deconvolution, a 1x1 convolution.

    FPN and C5 (Fig. 4 right): conv_dims=[256] * 5, four convolutions and the deconvolution, from
    14 x 14 to 28 x 28. C4 (Fig. 4 left): conv_dims=[256], the deconvolution alone, from res5's
    7 x 7 to 14 x 14. Layers and parameter names are those of detectron2's
    `MaskRCNNConvUpsampleHead`, whose checkpoints load.

    Args:
        input_shape: channels of the pooled features.
        num_classes: K, or 1 for class-agnostic masks.
        conv_dims: output channels of each 3x3 convolution, then of the deconvolution.
        conv_norm: normalisation of the 3x3 convolutions, as `detectron2.layers.get_norm` takes it.
        loss_type: "sigmoid" (the paper's) or "softmax" (Table 2b).
        loss_weight: multiplier of the loss.

    Raises:
        ValueError: on an unknown loss type or empty conv_dims.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str | Callable[[int], nn.Module] = "",
        loss_type: str = "sigmoid",
        loss_weight: float = 1.0,
    ) -> None:
        if not conv_dims:
            raise ValueError("conv_dims is empty, must name at least the deconvolution's channels")
        super().__init__(
            input_shape,
            num_classes=num_mask_maps(num_classes, loss_type),
            conv_dims=conv_dims,
            conv_norm=conv_norm,
            loss_weight=loss_weight,
        )
        self.num_classes = num_classes
        self.loss_type = loss_type

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        args = super().from_config(cfg, input_shape)
        del args["vis_period"]
        return {**args, **_mask_branch_config(cfg)}

    def features(self, x: Tensor) -> Tensor:
        """(R, C, P, P) -> (R, conv_dims[-1], 2P, 2P), after the deconvolution's ReLU."""
        for layer in self.children():
            if layer is not self.predictor:
                x = layer(x)
        return x

    def all_logits(self, features: Tensor) -> Tensor:
        return self.predictor(features)

    def class_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """(R, C, M, M) and int64 (R,) -> (R, M, M): each RoI meets its own class's filter only.

        The same numbers as `all_logits` at those classes, at a cost that does not grow with K.
        """
        filters = self.predictor.weight[classes].flatten(1)[:, None]  # (R, 1, C)
        bias = self.predictor.bias[classes][:, None, None]  # (R, 1, 1)
        logits = torch.baddbmm(bias, filters, features.flatten(2))
        return logits.view(-1, *features.shape[2:])


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNMLPHead(MaskBranch):
    """The MLP mask branch of Table 2e: fully connected layers that forget the spatial layout.

    fc_dims=[1024, 1024] is the row "1024-1024-80*28^2", [1024, 1024, 1024] the next.

    Args:
        input_shape: channels, height and width of the pooled features.
        num_classes: K, or 1 for class-agnostic masks.
        fc_dims: widths of the hidden layers, each followed by a ReLU; may be empty.
        mask_side: M of the predicted masks.
        loss_type: "sigmoid" (the paper's) or "softmax" (Table 2b).
        loss_weight: multiplier of the loss.

    Raises:
        ValueError: on an unknown loss type, or an input shape without height and width.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        fc_dims: Sequence[int] = (1024, 1024),
        mask_side: int = 28,
        loss_type: str = "sigmoid",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        if not (input_shape.height and input_shape.width):
            raise ValueError(
                f"input_shape is {input_shape}: fully connected layers need its height and width"
            )
        self.num_classes = num_classes
        self.loss_type = loss_type
        self.mask_side = mask_side
        width = input_shape.channels * input_shape.height * input_shape.width
        self.fcs: list[nn.Linear] = []
        for i, dim in enumerate(fc_dims, start=1):
            fc = nn.Linear(width, dim)
            weight_init.c2_xavier_fill(fc)
            self.add_module(f"mask_fc{i}", fc)
            self.fcs.append(fc)
            width = dim
        self.predictor = nn.Linear(width, num_mask_maps(num_classes, loss_type) * mask_side**2)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_HEAD
        return {
            "input_shape": input_shape,
            "fc_dims": head.FC_DIMS,
            "mask_side": 2 * head.POOLER_RESOLUTION,
            **_mask_branch_config(cfg),
        }

    def features(self, x: Tensor) -> Tensor:
        """(R, C, P, P) -> (R, fc_dims[-1])."""
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        return x

    def all_logits(self, features: Tensor) -> Tensor:
        num_maps = num_mask_maps(self.num_classes, self.loss_type)
        return self.predictor(features).view(-1, num_maps, self.mask_side, self.mask_side)

    def class_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """(R, D) and int64 (R,) -> (R, M, M): each RoI meets its own class's rows only.

        A class's rows are M^2 x D numbers, too many to gather for each RoI, hence class by class.
        """
        if len(classes) == 0:
            return self.all_logits(features)[:, 0]
        shape = (self.num_classes, self.mask_side**2)
        weights = self.predictor.weight.view(*shape, -1).unbind()
        biases = self.predictor.bias.view(shape).unbind()
        order = classes.argsort()
        present, counts = classes.unique(return_counts=True)
        parts = features[order].split(counts.tolist())
        logits = torch.cat(
            [F.linear(x, weights[k], biases[k]) for k, x in zip(present.tolist(), parts)]
        )
        return logits[order.argsort()].view(-1, self.mask_side, self.mask_side)
