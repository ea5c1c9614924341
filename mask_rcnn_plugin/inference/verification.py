"""Checks that an exported file gives the same outputs as its model."""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mask_rcnn_plugin.data.synthetic import draw_sample
from mask_rcnn_plugin.evaluation.average_precision import evaluate_tasks, find_backend
from mask_rcnn_plugin.evaluation.predictions import pack
from mask_rcnn_plugin.inference.export import Run, infer
from mask_rcnn_plugin.inference.predictor import Predictor

SCALES = (1.0, 0.8, 0.6)  # of the network's input: three sizes, whatever the images are
# Largest differences. Boxes in pixels; keypoints: the share that is elsewhere, as rounding decides
# between two pixels of a heatmap that are equally high.
LIMITS = {"boxes": 1e-3, "scores": 1e-4, "masks": 5e-3, "keypoints": 0.01}
AP_LIMIT = 0.1


class ExportMismatchError(Exception):
    """An exported file whose outputs differ; the message says on which image, and how."""


def example_images(predictor: Predictor, files: Sequence[str], count: int) -> dict[str, Tensor]:
    """`count` images by name as `ExportableModel` takes them, of files or else drawn."""
    images = {}
    for i in range(count):
        source: str | np.ndarray = (
            files[i % len(files)] if files else draw_sample(np.random.default_rng(i), 256)[0]
        )
        image = predictor.prepare(source)["image"].float()
        scale = SCALES[i % len(SCALES)]
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        name = source if isinstance(source, str) else "drawn image"
        images[f"{name}, {size[1]} x {size[0]}, number {i + 1}"] = image
    return images


def verify(predictor: Predictor, run: Run, images: dict[str, Tensor]) -> str:
    """Compare the answers on images, the last of which is made blank if all have detections.

    Returns:
        A sentence with the largest differences.

    Raises:
        ExportMismatchError: if they are more than `LIMITS` allow, or nothing is found at all.
    """
    images = dict(images)
    with torch.no_grad():
        expected = {n: _with_area(infer(predictor.model, x)) for n, x in images.items()}
        if all(len(outputs["scores"]) for outputs in expected.values()):
            last = list(images)[-1]
            for value in (0.0, 127.0, 255.0):
                blank = torch.full_like(images[last], value)
                nothing = _with_area(infer(predictor.model, blank))
                if not len(nothing["scores"]):
                    del images[last], expected[last]
                    name = f"blank image, {blank.shape[2]} x {blank.shape[1]}"
                    images[name], expected[name] = blank, nothing
                    break
    empty = sum(not len(outputs["scores"]) for outputs in expected.values())
    if empty == len(images):
        raise ExportMismatchError(
            f"nothing is found in any of the {empty} images, so nothing is verified: give "
            "--images with objects"
        )
    largest: dict[str, float] = {}
    found = []
    for name, outputs in expected.items():
        try:
            found.append(_with_area(run(images[name])))
        except Exception as error:  # a runtime's own kinds
            raise ExportMismatchError(f"{name}: {str(error).strip().splitlines()[0]}") from error
        for what, difference in _differences(name, outputs, found[-1]):
            largest[what] = max(difference, largest.get(what, 0.0))
            if not difference <= LIMITS[what]:
                raise ExportMismatchError(
                    f"{name}: {what} differ by {difference:.2g}, more than {LIMITS[what]:g}"
                )
    ap = _average_precision(list(expected.values()), found)
    if not ap >= 100 - AP_LIMIT:
        raise ExportMismatchError(f"AP against the model's own detections is {ap:.2f}, must be 100")
    without = (
        f"{empty} without detections" if empty else "none without detections, even a blank one"
    )
    sizes = len({image.shape for image in images.values()})
    differences = ", ".join(f"{what} {value:.1g}" for what, value in largest.items())
    return (
        f"verified on {len(expected)} images of {sizes} sizes, {without}; largest differences: "
        f"{differences}; AP {ap:.1f}"
    )


def _differences(
    name: str, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """What differs, and how much; equal scores may come in any order.

    Raises:
        ExportMismatchError: if detections are missing, or of another class.
    """
    count, theirs = len(expected["scores"]), len(found["scores"])
    if count != theirs:
        raise ExportMismatchError(f"{name}: {theirs} detections, the model has {count}")
    if not count:
        return
    apart = (expected["boxes"][:, None] - found["boxes"]).abs().amax(dim=2)
    apart[expected["classes"][:, None] != found["classes"]] = math.inf
    distance, nearest = apart.min(dim=1)
    if distance.isinf().any() or len(nearest.unique()) < count:
        raise ExportMismatchError(f"{name}: the classes of the detections differ")
    for what in ("boxes", "scores", "masks"):
        if what in expected:
            yield what, (expected[what] - found[what][nearest]).abs().max().item()
    if "keypoints" in expected:
        moved = (expected["keypoints"] - found["keypoints"][nearest]).abs()
        yield "scores", moved[..., 2].max().item()
        is_elsewhere = moved[..., :2].amax(dim=2) > 10 * LIMITS["boxes"]
        yield "keypoints", max(0, int(is_elsewhere.sum()) - 1) / is_elsewhere.numel()


def _with_area(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without boxes beside the image, which were cut to nothing: they match none."""
    boxes = outputs["boxes"]
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {name: value[kept] for name, value in outputs.items()}


def _average_precision(expected: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> float:
    """AP of the boxes, with those that the model finds as the truth."""
    truth = [t for number, outputs in enumerate(expected, 1) for t in _records(number, outputs)]
    ground_truth = {
        "images": [{"id": number} for number in range(1, len(expected) + 1)],
        "categories": [{"id": class_} for class_ in {t["category_id"] for t in truth}],
        "annotations": [{**t, "id": number} for number, t in enumerate(truth, 1)],
    }
    predictions = [pack(_records(number, outputs)) for number, outputs in enumerate(found, 1)]
    most = max(100, *(len(outputs["scores"]) for outputs in expected))
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's table
        scored = evaluate_tasks(find_backend(), ground_truth, predictions, ["bbox"], [1, 10, most])
    return 100 * float(scored["bbox"].stats[0])


def _records(image_id: int, outputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """COCO's of an image, true and predicted ones alike."""
    rows = zip(outputs["boxes"].tolist(), outputs["scores"].tolist(), outputs["classes"].tolist())
    return [
        {"image_id": image_id, "category_id": class_, "score": score, "iscrowd": 0,
         "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
        for (x0, y0, x1, y1), score, class_ in rows
    ]  # fmt: skip
