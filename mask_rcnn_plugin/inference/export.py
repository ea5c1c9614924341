"""Export of a model to a file for other programs: TorchScript, ONNX or torch.export.

Whatever the format, the file takes one image and gives tensors by name; see `ExportableModel`.
"""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import Conv2d
from detectron2.structures import Boxes, ImageList
from PIL import Image
from torch import Tensor, nn

from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.inference.optimize import optimize_for_inference
from mask_rcnn_plugin.inference.predictor import Predictor

FORMATS = ("torchscript", "onnx", "exported-program")
METADATA = "mask_rcnn_plugin.json"  # name of the extra file, and of the ONNX property

# Where `len` must not make a plain number of what differs from image to image.
_COUNTING = [
    *("detectron2.structures.boxes", "detectron2.structures.instances"),
    *("mask_rcnn_plugin.modeling.box_predictor", "mask_rcnn_plugin.modeling.roi_pooling"),
]

Run = Callable[[Tensor], dict[str, Tensor]]


class ExportableModel(nn.Module):
    """A detectron2 model of one image, tensors in and out, with batch norm folded.

    Args:
        model: in evaluation mode, on the CPU; unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = optimize_for_inference(model, channels_last=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: float32 (3, H, W), 0 to 255, channels in the order of the model's input format.

        Returns:
            "boxes" (R, 4), XYXY in pixels of `image`; "scores" (R,), descending; "classes" int64
            (R,); where the model has the branch, "masks" (R, M, M), probabilities inside the box,
            and "keypoints" (R, K, 3): x, y in pixels of `image` and score.
        """
        with patch_builtin_len(_COUNTING):
            return infer(self.model, image)


def infer(model: Any, image: Tensor) -> dict[str, Tensor]:
    """What `ExportableModel` gives, of a model as it is."""
    (found,) = model.inference([{"image": image}], do_postprocess=False)
    outputs = {
        "boxes": found.pred_boxes.tensor,
        "scores": found.scores,
        "classes": found.pred_classes,
    }
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    if found.has("pred_keypoints"):
        outputs["keypoints"] = found.pred_keypoints
    return outputs


def require_libraries(format: str) -> None:
    """Raise a UserError if what a format needs is not installed."""
    missing = [name for name in ("onnx", "onnxruntime") if format == "onnx" and not find_spec(name)]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'mask_rcnn_plugin[export]'"
        )


def metadata_of_export(predictor: Predictor) -> dict[str, Any]:
    """What a program that runs the file has to know, as JSON has it."""
    model: Any = predictor.model
    resizes = predictor.mapper.augmentations.augs
    points = (
        predictor.metadata.get("keypoint_names")
        if getattr(model.roi_heads, "keypoint_on", 0)
        else ()
    )
    rule = None  # not one that a few numbers describe
    if len(resizes) == 1 and isinstance(resizes[0], T.ResizeShortestEdge):
        lengths = {*resizes[0].short_edge_length}
        by_pillow = predictor.augmentation_input is T.AugInput
        if len(lengths) == 1 and by_pillow and resizes[0].interp == Image.Resampling.BILINEAR:
            rule = {"short_edge": lengths.pop(), "max_size": resizes[0].max_size}
    return {
        "class_names": predictor.names,
        "keypoint_names": list(points or ()),
        "input_format": predictor.mapper.image_format,
        "resize": rule,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "normalization": "inside the model",
    }


def write_exported(predictor: Predictor, format: str, file: IO[bytes], image: Tensor) -> None:
    """
    Args:
        predictor: of a model on the CPU.
        format: one of `FORMATS`.
        file: is written to.
        image: an example, as `ExportableModel` takes it; others may have any size.

    Raises:
        UserError: if the format cannot express the model.
    """
    model = ExportableModel(predictor.model).eval()
    text = json.dumps(metadata_of_export(predictor))
    write = {"torchscript": _write_torchscript, "onnx": _write_onnx}.get(format, _write_program)
    try:
        # Where torch.export fails, it prints its whole graph.
        with redirect_stderr(io.StringIO()), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that a trace fixes; they are verified
            write(model, file, image, text)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise UserError(f"--format {format} cannot express this model: {reason[:300]}") from error


def _write_torchscript(model: nn.Module, file: IO[bytes], image: Tensor, text: str) -> None:
    traced = torch.jit.trace(model, image, strict=False, check_trace=False)  # strict: no dict
    torch.jit.save(traced, file, _extra_files={METADATA: text})


def _write_onnx(model: nn.Module, file: IO[bytes], image: Tensor, text: str) -> None:
    import onnx

    outputs = model(image)
    free = {name: {0: "detections"} for name in outputs}
    written = io.BytesIO()
    # Where it fails, it prints its whole graph.
    with patch.object(torch._C, "_jit_set_onnx_log_enabled", create=True):
        torch.onnx.export(
            model,
            (image,),
            written,  # type: ignore[arg-type]
            dynamo=False,  # which follows numbers of boxes where the other exporter can't
            opset_version=17,  # RoiAlign with half_pixel is of 16
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}, **free},
        )
    graph = onnx.load_model_from_string(written.getvalue())
    for output, value in zip(graph.graph.output, outputs.values()):
        for dim, size in zip(output.type.tensor_type.shape.dim[1:], value.shape[1:]):
            dim.dim_value = size
    onnx.helper.set_model_props(graph, {METADATA: text})
    onnx.checker.check_model(graph)
    file.write(graph.SerializeToString())


def _write_program(model: Any, file: IO[bytes], image: Tensor, text: str) -> None:
    sides = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    with _without_questions(model.model):
        program = torch.export.export(
            model, (image,), dynamic_shapes={"image": sides}, strict=False
        )
    torch.export.save(program, file, extra_files={METADATA: text})


@contextmanager
def _without_questions(model: Any) -> Iterator[None]:
    """Parts of detectron2 without questions about sizes that `torch.export` does not know."""

    def set_tensor(boxes: Boxes, tensor: Tensor) -> None:
        boxes.tensor = tensor

    def convolve(conv: Any, x: Tensor) -> Tensor:
        x = conv._conv_forward(x, conv.weight, conv.bias)
        x = x if conv.norm is None else conv.norm(x)
        return x if conv.activation is None else conv.activation(x)

    def preprocess(inputs: list[dict[str, Tensor]]) -> ImageList:
        image = (inputs[0]["image"] - model.pixel_mean) / model.pixel_std
        size, divisor = tuple(image.shape[-2:]), model.backbone.size_divisibility
        if divisor > 1:  # numbers of their own for the padded sides: their rules are simpler
            border = []
            for side in reversed(size):
                blocks: Any = torch.scalar_tensor(side + divisor - 1, dtype=torch.int64) // divisor
                blocks = blocks.item()
                torch._check(blocks >= 1)
                torch._check(divisor * blocks >= side)
                border += [0, divisor * blocks - side]
            image = F.pad(image, border)
        return ImageList(image[None], [size])

    with ExitStack() as stack:
        stack.enter_context(patch.object(Boxes, "__init__", set_tensor))
        stack.enter_context(patch.object(Conv2d, "forward", convolve))
        stack.enter_context(patch.object(model, "preprocess_image", preprocess))
        yield


def load_exported(path: str | Path, format: str) -> Run:
    """What runs a file of `write_exported`: an image to outputs by name, on the CPU."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda image: dict(
            zip(names, map(torch.from_numpy, session.run(names, {"image": image.numpy()})))
        )
    if format == "torchscript":
        return torch.jit.load(str(path))
    with open(path, "rb") as file:
        return torch.export.load(file).module()
