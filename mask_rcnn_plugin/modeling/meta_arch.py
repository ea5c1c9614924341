"""Mask R-CNN as a detectron2 meta-architecture."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances

from mask_rcnn_plugin.fast.mask_encoding import encode_masks
from mask_rcnn_plugin.fast.mask_rle import RLEMasks
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config

MASK_FORMATS = ("rle", "bitmap")


@META_ARCH_REGISTRY.register()
class MaskRCNN(GeneralizedRCNN):
    """`GeneralizedRCNN` whose masks leave as run-length encodings.

    detectron2 pastes the masks of an image into one R x H x W tensor; at 100 detections that is the
    largest thing in memory and most of the time after the network. Here `pred_masks` is an
    `RLEMasks`.

    Args:
        mask_format: "rle", or "bitmap" for detectron2's bool tensor (R, H, W).
        Others: as `GeneralizedRCNN`.

    Raises:
        ValueError: on an unknown mask_format.
    """

    @configurable
    def __init__(self, *, mask_format: str = "rle", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mask_format not in MASK_FORMATS:
            raise ValueError(f"mask_format is {mask_format!r}, must be one of {MASK_FORMATS}")
        self.mask_format = mask_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        require_mask_rcnn_config(cfg)
        return {**super().from_config(cfg), "mask_format": cfg.MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT}

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """
        Args:
            batched_inputs: one dict an image, with "image", uint8 or float (3, H, W), and the
                "height" and "width" wanted for the output (those of "image" if absent).
            detected_instances: boxes and classes already known, in pixels of "image"; the box
                branch is skipped then.
            do_postprocess: False leaves the network's own coordinates and (R, 1, M, M) soft masks.

        Returns:
            For each image {"instances": Instances} with `pred_boxes`, `scores` (softmax
            probability), `pred_classes`, and, where the model has the branch, `pred_masks`
            (`RLEMasks` or bool (R, H, W)) and `pred_keypoints` (R, K, 3), all in pixels of the
            output size.
        """
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        outputs = []
        for instances, image in zip(results, batched_inputs):
            height, width = image["image"].shape[-2:]
            height, width = image.get("height", height), image.get("width", width)
            outputs.append({"instances": self._to_output(instances, height, width)})
        return outputs

    def _to_output(self, instances: Instances, height: int, width: int) -> Instances:
        if self.mask_format == "bitmap" or not instances.has("pred_masks"):
            return detector_postprocess(instances, height, width)
        # Under another name the soft masks pass detectron2's post-processing unpasted, while boxes
        # are scaled and empty ones dropped.
        instances.mask_probs = instances.pred_masks
        instances.remove("pred_masks")
        instances = detector_postprocess(instances, height, width)
        rles = encode_masks(
            instances.mask_probs[:, 0], instances.pred_boxes.tensor, (height, width)
        )
        instances.remove("mask_probs")
        instances.pred_masks = RLEMasks(rles, (height, width), instances.pred_boxes.device)
        return instances
