"""RoI heads: detectron2's, with the paper's RoI layers, for YAML and LazyConfig alike.

A LazyConfig passes poolers, res5 and heads by keyword, a YAML config names them; `from_config`
translates. Everything else (matching, sampling, losses, inference) is detectron2's.
"""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads, build_mask_head
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from mask_rcnn_plugin.fast.folding import fold_frozen_batch_norm
from mask_rcnn_plugin.fast.replacement import as_class, renamed
from mask_rcnn_plugin.modeling.backbone import res5_head
from mask_rcnn_plugin.modeling.box_predictor import MaskRCNNBoxPredictor
from mask_rcnn_plugin.modeling.keypoint_head import select_visible
from mask_rcnn_plugin.modeling.proposal_sampling import ProposalSampling, foreground
from mask_rcnn_plugin.modeling.roi_pooling import RoIPooler, find_roi_layer
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config

_RES5_SIDE = 7  # of res5's output on an RoI (Fig. 4, left)

Shapes = dict[str, ShapeSpec]
Features = dict[str, Tensor]


def _pooler_from_config(cfg: CfgNode, branch: str, input_shape: Shapes) -> RoIPooler:
    """The pooler that the keys of the "BOX", "MASK" or "KEYPOINT" head describe."""
    head = cfg.MODEL[f"ROI_{branch}_HEAD"]
    layer = find_roi_layer(head.POOLER_TYPE, f"MODEL.ROI_{branch}_HEAD.POOLER_TYPE")
    return RoIPooler(
        output_size=head.POOLER_RESOLUTION,
        scales=[1 / input_shape[f].stride for f in cfg.MODEL.ROI_HEADS.IN_FEATURES],
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=layer,
        aggregation=head.POOLER_AGGREGATION,
    )


def _with_stock_poolers(cfg: CfgNode) -> CfgNode:
    """A copy that detectron2's own `from_config` accepts, whose poolers are then replaced.

    An empty type, detectron2's "no pooler", stays empty.
    """
    require_mask_rcnn_config(cfg, "ROI_HEADS.NAME")
    cfg = cfg.clone()
    cfg.defrost()
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_KEYPOINT_HEAD):
        if head.POOLER_TYPE or head is cfg.MODEL.ROI_BOX_HEAD:
            head.POOLER_TYPE = "ROIAlignV2"
    return cfg


@ROI_HEADS_REGISTRY.register()
class MaskRCNNROIHeads(ProposalSampling, StandardROIHeads):
    """Box, mask and keypoint branches, each with a pooler of its own (FPN, C5; Fig. 4, right).

    Masks, keypoints or both may be absent. In inference the mask and keypoint branches see the
    detections that are left after NMS, at most `box_predictor.test_topk_per_image` an image (100 in
    the paper). Arguments are those of `StandardROIHeads`; pass `RoIPooler`s. A mask or keypoint
    head without a pooler (in YAML an empty POOLER_TYPE) gets the dict of its feature maps.

    Raises:
        ValueError: if a branch is given in part, e.g. a mask head without its features, or a head
            that takes pooled features has no pooler.
    """

    # As detectron2's export declares them of `StandardROIHeads`; it looks at the very class.
    mask_on: torch.jit.Final[bool]  # type: ignore[misc]
    keypoint_on: torch.jit.Final[bool]  # type: ignore[misc]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for branch in ("mask", "keypoint"):
            parts = [f"{branch}_{part}" for part in ("in_features", "head", "pooler")]
            given = [part for part in parts if kwargs.get(part) is not None]
            if given and given[:2] != parts[:2]:
                raise ValueError(
                    f"the {branch} branch has {given} only: give {parts[0]} and {parts[1]}, or "
                    f"none of {parts}"
                )
            head = kwargs.get(f"{branch}_head")
            if len(given) == 2 and isinstance(head, nn.Sequential):  # the pooled heads all are
                raise ValueError(
                    f"{branch}_pooler is missing, but a {type(head).__name__} takes pooled features"
                )
        super().__init__(*args, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Shapes) -> dict[str, Any]:
        parts = super().from_config(_with_stock_poolers(cfg), input_shape)
        for branch in ("BOX", "MASK", "KEYPOINT"):
            pooler = f"{branch.lower()}_pooler"
            if parts.get(pooler) is not None:
                parts[pooler] = _pooler_from_config(cfg, branch, input_shape)
        parts["box_predictor"] = as_class(parts["box_predictor"], MaskRCNNBoxPredictor)
        return parts

    # What `super()` would be; torch.jit.script knows none.
    _stock_mask = renamed(StandardROIHeads._forward_mask, "_stock_mask")
    _stock_keypoint = renamed(StandardROIHeads._forward_keypoint, "_stock_keypoint")

    def _forward_mask(self, features: Features, instances: list[Instances]):  # type: ignore[no-untyped-def]
        if self.training and self.mask_on:
            instances = foreground(instances, self.num_classes)[0]
            x = _pooled(features, self.mask_in_features, self.mask_pooler, instances)
            return self.mask_head(x, instances)
        return self._stock_mask(features, instances)

    def _forward_keypoint(self, features: Features, instances: list[Instances]):  # type: ignore[no-untyped-def]
        if self.training and self.keypoint_on:
            instances = select_visible(foreground(instances, self.num_classes)[0])
            x = _pooled(features, self.keypoint_in_features, self.keypoint_pooler, instances)
            return self.keypoint_head(x, instances)
        return self._stock_keypoint(features, instances)


def _pooled(
    features: Features, names: list[str], pooler: nn.Module | None, instances: list[Instances]
) -> Any:
    """What a head takes in training: the proposals' features, or whole maps without a pooler."""
    if pooler is None:
        return {name: features[name] for name in names}
    return pooler([features[name] for name in names], [i.proposal_boxes for i in instances])


@ROI_HEADS_REGISTRY.register()
class MaskRCNNC4ROIHeads(ProposalSampling, Res5ROIHeads):
    """Box and mask branches on a shared res5 (C4; Fig. 4, left).

    The paper pools 7 x 7 and runs res5 at stride 1; detectron2's zoo pools 14 x 14 and runs it at
    stride 2. In LazyConfig both are keywords (`pooler`, `res5`); in YAML
    MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION says which, the stride being what leaves 7 x 7.
    Arguments are those of `Res5ROIHeads`; pass a `RoIPooler` and a `res5_head`.

    Raises:
        ValueError: if pooler and res5 do not leave 7 x 7; from YAML, with MODEL.KEYPOINT_ON: the
            paper has no keypoint branch on C4 features.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        side, stride = self.pooler.output_size[0], self.res5[0].stride
        if side != _RES5_SIDE * stride:
            raise ValueError(
                f"the pooler gives {side} x {side} and res5 has stride {stride}: must be 7 at "
                "stride 1 (the paper) or 14 at stride 2 (detectron2's zoo)"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Shapes) -> dict[str, Any]:
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                "MODEL.KEYPOINT_ON is True with MaskRCNNC4ROIHeads, which has no keypoint branch: "
                "use MaskRCNNROIHeads on an FPN backbone (Sec. 5)"
            )
        stock = _with_stock_poolers(cfg)
        stock.MODEL.MASK_ON = False  # its mask head would be told the pooler's side, not res5's
        parts = super().from_config(stock, input_shape)
        parts["pooler"] = _pooler_from_config(cfg, "BOX", input_shape)
        parts["res5"] = _res5_from_config(cfg, parts["res5"])
        if cfg.MODEL.MASK_ON:
            channels = parts["res5"][-1].out_channels
            shape = ShapeSpec(channels=channels, height=_RES5_SIDE, width=_RES5_SIDE)
            parts["mask_head"] = build_mask_head(cfg, shape)
        parts["box_predictor"] = as_class(parts["box_predictor"], MaskRCNNBoxPredictor)
        return parts

    _inference = renamed(Res5ROIHeads.forward, "_inference")

    def forward(  # type: ignore[no-untyped-def]
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ):
        """As `Res5ROIHeads.forward`."""
        if not self.training:
            return self._inference(images, features, proposals, targets)
        assert targets
        proposals = self.label_and_sample_proposals(proposals, targets)
        x = self._shared_roi_transform(
            [features[name] for name in self.in_features], [p.proposal_boxes for p in proposals]
        )
        losses = self.box_predictor.losses(self.box_predictor(x.mean(dim=[2, 3])), proposals)
        if self.mask_on:
            positives, rows = foreground(proposals, self.num_classes)
            parts = zip(x.split([len(p) for p in proposals]), rows)
            x = torch.cat([of_image[its_rows] for of_image, its_rows in parts])
            losses.update(self.mask_head(x, positives))
        return [], losses


def _res5_from_config(cfg: CfgNode, res5: nn.Sequential) -> nn.Sequential:
    """detectron2's res5, of bottlenecks at stride 2, as the resolution and depth want it."""
    resolution = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    if resolution not in (_RES5_SIDE, 2 * _RES5_SIDE):
        raise ValueError(
            f"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION is {resolution}, must be 7 (res5 at stride 1, "
            "the paper) or 14 (stride 2, detectron2's zoo)"
        )
    stride = resolution // _RES5_SIDE
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH < 50:
        name, width = f"ResNet-{resnets.DEPTH}-C4", resnets.RES2_OUT_CHANNELS
        return res5_head(name, stride=stride, width=width, norm=resnets.NORM)
    first: Any = res5[0]
    first.stride = stride
    for conv in (first.shortcut, first.conv1, first.conv2):
        conv.stride = tuple(min(s, stride) for s in conv.stride)
    return fold_frozen_batch_norm(res5)
