"""The keypoint branch of Sec. 5."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY, KRCNNConvDeconvUpsampleHead
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
from detectron2.structures import Instances
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
            logits = self.layers(x).contiguous()  # of which detectron2's loss takes a view
            loss = keypoint_rcnn_loss(logits, instances, normalizer)
            return {"loss_keypoint": self.loss_weight * loss}
        boxes = cat([i.pred_boxes.tensor for i in instances])
        keypoints = decode_keypoints(self.layers(x), boxes)
        # Not len: it would be a number in a trace.
        counts = [i.pred_boxes.tensor.shape[0] for i in instances]
        for per_image, i in zip(keypoints.split(counts), instances):
            i.pred_keypoints = per_image
        return instances
