"""The keypoint branch of Sec. 5."""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY, KRCNNConvDeconvUpsampleHead
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import get_event_storage
from torch import Tensor

from mask_rcnn_plugin.fast.keypoint_decoding import decode_keypoints
from mask_rcnn_plugin.modeling.yaml_keys import require_pooler, warn_of_ignored_keys


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class MaskRCNNKeypointHead(KRCNNConvDeconvUpsampleHead):
    """Eight 3x3 convolutions of 512 channels, a deconvolution and bilinear x2 (Sec. 5).

    From 14 x 14 RoI features to K heatmaps of 56 x 56. Layers and parameter names are those of
    detectron2's `KRCNNConvDeconvUpsampleHead`, whose checkpoints load.

    Args:
        input_shape: channels of the pooled features.
        num_keypoints: K, 17 for COCO persons.
        conv_dims: channels of each 3x3 convolution.
        loss_weight: multiplier of the loss.
        loss_normalizer: "visible" averages over the keypoints that have a target; a number divides
            the sum by that number times the images of the batch.

    Raises:
        ValueError: on another loss_normalizer.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_keypoints: int = 17,
        conv_dims: tuple[int, ...] = (512,) * 8,
        loss_weight: float = 1.0,
        loss_normalizer: float | str = "visible",
    ) -> None:
        if loss_normalizer != "visible" and not isinstance(loss_normalizer, (int, float)):
            raise ValueError(
                f"loss_normalizer is {loss_normalizer!r}, must be 'visible' or a number"
            )
        super().__init__(
            input_shape,
            num_keypoints=num_keypoints,
            conv_dims=conv_dims,
            loss_weight=loss_weight,
            loss_normalizer=(
                loss_normalizer if loss_normalizer == "visible" else float(loss_normalizer)
            ),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        warn_of_ignored_keys(cfg, "ROI_KEYPOINT_HEAD.NAME")
        require_pooler(cfg, "KEYPOINT", input_shape)
        return super().from_config(cfg, input_shape)

    def forward(self, x: Tensor, instances: list[Instances]):  # type: ignore[no-untyped-def]
        """
        Args:
            x: (R, C, P, P), pooled features of the RoIs in `instances`, in their order. In
                training these are the positive RoIs that hold a labelled keypoint.
            instances: one for each image; in training with `proposal_boxes` and `gt_keypoints`, in
                inference with `pred_boxes`.

        Returns:
            Training: {"loss_keypoint": scalar}.
            Inference: `instances`, each with `pred_keypoints`, (its R, K, 3): x, y in pixels of the
            network's input image and score.
        """
        if self.training:
            by_visible = self.loss_normalizer == "visible"
            normalizer = None if by_visible else len(instances) * self.loss_normalizer
            loss = keypoint_loss(self.layers(x), instances, normalizer)
            return {"loss_keypoint": self.loss_weight * loss}
        boxes = cat([i.pred_boxes.tensor for i in instances])
        keypoints = decode_keypoints(self.layers(x), boxes)
        # Not len: it would be a number in a trace.
        counts = [i.pred_boxes.tensor.shape[0] for i in instances]
        for per_image, i in zip(keypoints.split(counts), instances):
            i.pred_keypoints = per_image
        return instances


def keypoint_loss(logits: Tensor, instances: list[Instances], normalizer: float | None) -> Tensor:
    """detectron2's `keypoint_rcnn_loss`, which does not make the host wait for a GPU.

    Args:
        logits: (R, K, M, M).
        instances: one for each image, R in all, with `proposal_boxes` and `gt_keypoints`.
        normalizer: divides the sum of the cross entropies; None takes the number of keypoints that
            have a target: labelled and in their box.

    Returns:
        Scalar; 0 without a target.
    """
    some = [i for i in instances if len(i)]
    if not some:  # it counts such batches, too
        return keypoint_rcnn_loss(logits, [], normalizer)
    boxes = Boxes.cat([i.proposal_boxes for i in some])
    cells, has_target = Keypoints.cat([i.gt_keypoints for i in some]).to_heatmap(
        boxes.tensor, logits.shape[2]
    )
    ignored = -100
    targets = cells.masked_fill(has_target == 0, ignored).flatten()
    loss = F.cross_entropy(
        logits.flatten(2).flatten(0, 1), targets, ignore_index=ignored, reduction="sum"
    )
    return loss / (has_target.sum().clamp(min=1) if normalizer is None else normalizer)


def select_visible(proposals: list[Instances]) -> list[Instances]:
    """detectron2's `select_proposals_with_visible_keypoints`, with one read of the device.

    Args:
        proposals: the positives of each image, with `proposal_boxes` and, if there are any,
            `gt_keypoints`.

    Returns:
        Those of each image that hold a visible keypoint, the border included.
    """
    storage, name = get_event_storage(), "keypoint_head/num_fg_samples"
    some = [i for i in proposals if len(i)]
    if not some:
        storage.put_scalar(name, 0)
        return proposals
    x, y, visibility = cat([i.gt_keypoints.tensor for i in some]).unbind(dim=2)
    x1, y1, x2, y2 = cat([i.proposal_boxes.tensor for i in some]).split(1, dim=1)
    is_inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
    is_selected = (is_inside & (visibility >= 1)).any(dim=1)
    # All that are selected, in their order; how many of each image is read.
    indices = (~is_selected).byte().argsort(stable=True)
    flags = is_selected.tolist()

    selected, start, num_selected = [], 0, 0
    for of_image in proposals:
        on_host = [i for i, flag in enumerate(flags[start : start + len(of_image)]) if flag]
        on_device = indices[num_selected : num_selected + len(on_host)] - start
        chosen = Instances(of_image.image_size)
        for field, value in of_image.get_fields().items():
            is_list: Any = isinstance(value, PolygonMasks)
            chosen.set(field, value[on_host if is_list else on_device])
        selected.append(chosen)
        start, num_selected = start + len(of_image), num_selected + len(on_host)
    storage.put_scalar(name, num_selected / len(some))
    return selected
