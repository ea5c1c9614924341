"""Mask R-CNN as a detectron2 meta-architecture."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from torch import Tensor

from mask_rcnn_plugin.fast.mask_encoding import encode_masks
from mask_rcnn_plugin.fast.mask_rle import RLEMasks
from mask_rcnn_plugin.fast.replacement import renamed
from mask_rcnn_plugin.fast.transfer import move_together
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config

MASK_FORMATS = ("bitmap", "rle")


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
    _bitmap_inference = renamed(GeneralizedRCNN.inference, "_bitmap_inference")
    _losses = renamed(GeneralizedRCNN.forward, "_losses")

    def forward(self, batched_inputs: list[dict[str, Tensor]]):  # type: ignore[no-untyped-def]
        """As `GeneralizedRCNN.forward`: losses in training, else what `inference` returns."""
        if self.training:
            return self._losses(self._on_device(batched_inputs))
        return self.inference(batched_inputs)

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
            results = self._bitmap_inference(
                self._on_device(batched_inputs), detected_instances, False
            )
            return [{"instances": r} for r in _with_rle_masks(results, batched_inputs)]
        return self._bitmap_inference(batched_inputs, detected_instances, do_postprocess)

    def _on_device(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inputs with their images and, in training, ground truth on the model's device.

        detectron2 copies each image, box, class and keypoint of its own, and draws those of the
        host.
        """
        images = [x["image"] for x in batched_inputs]
        targets = [x["instances"] for x in batched_inputs if self.training and "instances" in x]
        fields = [value for target in targets for value in target.get_fields().values()]
        tensors = [
            *images,
            *(x if isinstance(x, Tensor) else x.tensor for x in fields if _moves(x)),
        ]
        draws = self.training and self.vis_period > 0
        if draws or self.device.type == "cpu" or any(x.device.type != "cpu" for x in tensors):
            return batched_inputs
        moved = iter(move_together(tensors, self.device))
        inputs = [{**x, "image": next(moved)} for x in batched_inputs]
        for x, target in zip(inputs, targets):
            x["instances"] = Instances(target.image_size)
            for name, value in target.get_fields().items():
                if _moves(value):
                    tensor = next(moved)
                    value = tensor if isinstance(value, Tensor) else type(value)(tensor)
                x["instances"].set(name, value)
        return inputs


def _moves(field: Any) -> bool:
    """Whether a field of Instances is a tensor, or a class of detectron2 that wraps one."""
    return isinstance(field, Tensor | Boxes | Keypoints | BitMasks)


def _with_rle_masks(
    results: list[Instances], batched_inputs: list[dict[str, Any]]
) -> list[Instances]:
    """detectron2's post-processing with masks encoded, and one wait for all images."""
    sizes = [
        tuple(x.get(k, n) for k, n in zip(("height", "width"), x["image"].shape[-2:]))
        for x in batched_inputs
    ]
    outputs = []
    for result, (height, width) in zip(results, sizes):
        output = Instances((height, width), **result.get_fields())
        scale_y, scale_x = (new / old for new, old in zip((height, width), result.image_size))
        boxes = output.pred_boxes.tensor
        boxes[:, 0::2].mul_(scale_x).clamp_(0, width)
        boxes[:, 1::2].mul_(scale_y).clamp_(0, height)
        if output.has("pred_keypoints"):
            output.pred_keypoints[:, :, 0].mul_(scale_x)
            output.pred_keypoints[:, :, 1].mul_(scale_y)
        outputs.append(output)
    return _encoded(outputs)


def _encoded(outputs: list[Instances]) -> list[Instances]:
    """Instances with boxes that aren't empty, and their masks encoded."""
    has_masks = all(output.has("pred_masks") for output in outputs)
    wanted = [o.pred_boxes.tensor.flatten() for o in outputs]
    if has_masks:
        wanted += [o.pred_masks.float().flatten() for o in outputs]
    on_host = torch.cat(wanted).cpu().split([len(x) for x in wanted])
    encoded = []
    for i, output in enumerate(outputs):
        boxes = on_host[i].view(-1, 4)
        is_empty = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        keep = (~is_empty).nonzero()[:, 0]
        rles = None
        if has_masks:
            probs = on_host[len(outputs) + i].view(-1, *output.pred_masks.shape[-2:])
            rles = encode_masks(probs[keep], boxes[keep], output.image_size)
            output.remove("pred_masks")
        if len(keep) < len(output):
            output = output[keep.to(output.pred_boxes.device)]
        if rles is not None:
            output.pred_masks = RLEMasks(rles, output.image_size, output.pred_boxes.device)
        encoded.append(output)
    return encoded
