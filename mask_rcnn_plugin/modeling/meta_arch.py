"""Mask R-CNN as a detectron2 meta-architecture."""

from types import FunctionType
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances
from torch import Tensor

from mask_rcnn_plugin.fast.mask_encoding import encode_masks
from mask_rcnn_plugin.fast.mask_rle import RLEMasks
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config

MASK_FORMATS = ("bitmap", "rle")


def _renamed(function: FunctionType, name: str) -> FunctionType:
    """The same function under another name, by which torch.jit.script tells methods apart."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    return copy


@META_ARCH_REGISTRY.register()
class MaskRCNN(GeneralizedRCNN):
    """`GeneralizedRCNN` whose masks can leave as run-length encodings.

    detectron2 pastes the masks of an image into one R x H x W tensor; at 100 detections that is the
    largest thing in memory and takes most of the time after the network. With mask_format="rle",
    `pred_masks` is an `RLEMasks`, which answers as that tensor does.

    Args:
        mask_format: "bitmap", detectron2's bool tensor (R, H, W), or "rle". A trace
            (`torch.jit.trace`, `FlopCountAnalysis`) holds tensors alone and always gives bitmaps.
        Others: as `GeneralizedRCNN`.

    Raises:
        ValueError: on an unknown mask_format.
    """

    @configurable
    def __init__(self, *, mask_format: str = "bitmap", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mask_format not in MASK_FORMATS:
            raise ValueError(f"mask_format is {mask_format!r}, must be one of {MASK_FORMATS}")
        self.mask_format = mask_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        require_mask_rcnn_config(cfg, "META_ARCHITECTURE")
        return {**super().from_config(cfg), "mask_format": cfg.MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT}

    # What `super().inference` would be; torch.jit.script knows no `super`.
    _bitmap_inference = _renamed(GeneralizedRCNN.inference, "_bitmap_inference")

    def inference(  # type: ignore[no-untyped-def]
        self,
        batched_inputs: list[dict[str, Tensor]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):  # torch.jit.script infers the type, which depends on do_postprocess
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
            output size. With do_postprocess=False, the Instances themselves.
        """
        if (
            not torch.jit.is_scripting()
            and do_postprocess
            and self.mask_format == "rle"
            and not torch.jit.is_tracing()
        ):
            results = self._bitmap_inference(batched_inputs, detected_instances, False)
            return [
                {"instances": _with_rle_masks(instances, image)}
                for instances, image in zip(results, batched_inputs)
            ]
        return self._bitmap_inference(batched_inputs, detected_instances, do_postprocess)


def _with_rle_masks(instances: Instances, image: dict[str, Any]) -> Instances:
    """detectron2's post-processing of one image, but for the format of the masks."""
    size = image["image"].shape[-2:]
    height, width = image.get("height", size[0]), image.get("width", size[1])
    if not instances.has("pred_masks"):
        return detector_postprocess(instances, height, width)
    # Under another name the soft masks pass detectron2's post-processing unpasted, while boxes
    # are scaled and empty ones dropped.
    instances.mask_probs = instances.pred_masks
    instances.remove("pred_masks")
    instances = detector_postprocess(instances, height, width)
    probs, boxes = instances.mask_probs[:, 0], instances.pred_boxes.tensor
    instances.remove("mask_probs")
    rles = encode_masks(probs, boxes, (height, width))
    instances.pred_masks = RLEMasks(rles, (height, width), probs.device)
    return instances
