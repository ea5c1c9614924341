"""Mask branches: the FCN of Fig. 4 and the MLP of Table 2e."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import (
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
    mask_rcnn_inference,
)
from detectron2.structures import Instances
from fvcore.nn import weight_init
from torch import Tensor, nn

from mask_rcnn_plugin.fast.grouping import grouped
from mask_rcnn_plugin.modeling.mask_loss import find_masks, mask_targets
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config, require_pooler


class MaskBranch:
    """What both heads do with their layers, in training and in inference.

    A head is an `nn.Sequential` that ends with `predictor`, which makes maps of features, and
    `masks` (see mask_loss.py), which makes masks of maps. Called as such, by `layers`, it computes
    the maps of all classes. A head also gives

    * `all_maps(features)`: (R, num_maps, M, M);
    * `class_maps(features, classes)`: (R, M, M), the map of each RoI's class alone, at a cost that
      doesn't grow with K.
    """

    predictor: Any
    masks: Any
    num_classes: int  # K, or 1 if class-agnostic
    loss_weight: float
    training: bool

    def forward(self, x: Tensor, instances: list[Instances]):  # type: ignore[no-untyped-def]
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
        if self.training:
            return {"loss_mask": self.loss_weight * self._loss(x, instances)}
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            logits = self.layers(x)  # the same operations, whatever the classes
        else:
            classes = self._map_of_each([i.pred_classes for i in instances])
            logits = self.masks(self.masks.maps(self, self.features(x), classes))
        mask_rcnn_inference(logits, instances)
        return instances

    def _loss(self: Any, x: Tensor, instances: list[Instances]) -> Tensor:
        features = self.features(x)
        # Images without a positive RoI have no gt_masks at all.
        instances = [i for i in instances if len(i) > 0]
        if not instances:
            # Ties the loss to every parameter of the branch, as distributed training wants.
            return self.all_maps(features).sum() * 0
        classes = self._map_of_each([i.gt_classes for i in instances])
        maps = self.masks.maps(self, features, classes)
        boxes = [i.proposal_boxes.tensor for i in instances]
        targets = mask_targets([i.gt_masks for i in instances], boxes, maps.shape[-1])
        return self.masks.loss(maps, targets, classes)

    def _map_of_each(self, classes: list[Tensor]) -> Tensor:
        """Which map belongs to each RoI: its class's, or the only one if class-agnostic."""
        flat = cat(classes).to(torch.int64)
        return torch.zeros_like(flat) if self.num_classes == 1 else flat

    def layers(self: Any, x: Tensor) -> Tensor:
        """(R, C, P, P) -> (R, K, M, M), binary logits of every class."""
        for layer in self:
            x = layer(x)
        return x

    def features(self: Any, x: Tensor) -> Tensor:
        """(R, C, P, P) -> what goes into the predictor."""
        for layer in self:
            if layer is self.predictor:
                break
            x = layer(x)
        return x


def _mask_branch_config(cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
    require_mask_rcnn_config(cfg, "ROI_MASK_HEAD.NAME")
    require_pooler(cfg, "MASK", input_shape)
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
        loss_type: "sigmoid" (the paper's), "softmax" (Table 2b), or another; see `find_masks`.
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
        loss_type: str | Callable[..., Any] = "sigmoid",
        loss_weight: float = 1.0,
    ) -> None:
        if not conv_dims:
            raise ValueError("conv_dims is empty, must name at least the deconvolution's channels")
        masks = find_masks(loss_type)()
        super().__init__(
            input_shape,
            num_classes=masks.num_maps(num_classes),
            conv_dims=conv_dims,
            conv_norm=conv_norm,
            loss_weight=loss_weight,
        )
        self.num_classes = num_classes
        self.loss_type = loss_type
        self.masks = masks

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        args = super().from_config(cfg, input_shape)
        del args["vis_period"]
        return {**args, **_mask_branch_config(cfg, input_shape)}

    def all_maps(self, features: Tensor) -> Tensor:
        """(R, conv_dims[-1], M, M) -> (R, num_maps, M, M)."""
        return self.predictor(features)

    def class_maps(self, features: Tensor, classes: Tensor) -> Tensor:
        """(R, C, M, M) and int64 (R,) -> (R, M, M): each RoI meets its own class's filter only."""
        filters = self.predictor.weight[classes].flatten(1)[:, None]  # (R, 1, C)
        bias = self.predictor.bias[classes][:, None, None]  # (R, 1, 1)
        logits = torch.baddbmm(bias, filters, features.flatten(2))
        return logits.view(-1, *features.shape[2:])


class _Unflatten(nn.Unflatten):
    def forward(self, x: Tensor) -> Tensor:
        # As `nn.Unflatten`, of which ONNX's exporter takes the number of rows for a constant.
        return x.view(-1, *self.unflattened_size)


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNMLPHead(MaskBranch, BaseMaskRCNNHead, nn.Sequential):  # type: ignore[misc]
    """The MLP mask branch of Table 2e: fully connected layers that forget the spatial layout.

    fc_dims=[1024, 1024] is the row "1024-1024-80*28^2", [1024, 1024, 1024] the next.

    Args:
        input_shape: channels, height and width of the pooled features.
        num_classes: K, or 1 for class-agnostic masks.
        fc_dims: widths of the hidden layers, each followed by a ReLU; may be empty.
        mask_side: M of the predicted masks.
        loss_type: "sigmoid" (the paper's), "softmax" (Table 2b), or another; see `find_masks`.
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
        loss_type: str | Callable[..., Any] = "sigmoid",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)  # type: ignore[call-overload]
        if not (input_shape.height and input_shape.width):
            raise ValueError(
                f"input_shape is {input_shape}: fully connected layers need its height and width"
            )
        masks = find_masks(loss_type)()
        self.num_classes = num_classes
        self.loss_type = loss_type
        self.flatten = nn.Flatten()
        width = input_shape.channels * input_shape.height * input_shape.width
        for i, dim in enumerate(fc_dims, start=1):
            fc = nn.Linear(width, dim)
            weight_init.c2_xavier_fill(fc)
            self.add_module(f"mask_fc{i}", fc)
            self.add_module(f"mask_fc_relu{i}", nn.ReLU())
            width = dim
        num_maps = masks.num_maps(num_classes)
        self.predictor = nn.Linear(width, num_maps * mask_side**2)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)
        self.to_maps = _Unflatten(1, (num_maps, mask_side, mask_side))
        self.masks = masks

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_HEAD
        return {
            "input_shape": input_shape,
            "fc_dims": head.FC_DIMS,
            "mask_side": 2 * head.POOLER_RESOLUTION,
            **_mask_branch_config(cfg, input_shape),
        }

    def all_maps(self, features: Tensor) -> Tensor:
        """(R, fc_dims[-1]) -> (R, num_maps, M, M)."""
        return self.to_maps(self.predictor(features))

    def class_maps(self, features: Tensor, classes: Tensor) -> Tensor:
        """(R, D) and int64 (R,) -> (R, M, M): each RoI meets its own class's rows only.

        A class's rows are M^2 x D numbers, too many to gather for each RoI, hence class by class.
        """
        if torch.compiler.is_compiling():  # one graph for all classes
            return self.all_maps(features)[torch.arange(classes.shape[0]), classes]
        if len(classes) == 0:
            return self.all_maps(features)[:, 0]
        num_maps, *side = self.to_maps.unflattened_size
        weights = self.predictor.weight.unflatten(0, (num_maps, -1)).unbind()
        biases = self.predictor.bias.unflatten(0, (num_maps, -1)).unbind()
        order, counts = grouped(classes, num_maps)
        parts = zip(features[order].split(counts), weights, biases)
        maps = torch.cat([F.linear(*part) for part in parts if len(part[0])])
        return maps[order.argsort()].unflatten(1, side)
