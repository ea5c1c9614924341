"""Whether an exported file answers as its model does."""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from mask_rcnn_plugin.data.synthetic import draw_sample
from mask_rcnn_plugin.evaluation.average_precision import evaluate_tasks, find_backend
from mask_rcnn_plugin.evaluation.predictions import coco_results, pack
from mask_rcnn_plugin.inference.export import Run
from mask_rcnn_plugin.inference.predictor import Predictor

SCALES = (1.0, 0.8, 0.6)  # of the network's input: three sizes, whatever the images are
# Largest differences. Boxes in pixels; keypoints: the share that is elsewhere, as rounding decides
# between two pixels of a heatmap that are equally high.
LIMITS = {"boxes": 1e-3, "scores": 1e-4, "masks": 5e-3, "keypoints": 0.01}
AP_LIMIT = 0.1


class ExportMismatchError(Exception):
    """An exported file that answers differently; the message says on which image, and how."""


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
    """Compare the answers on images, one of which is left blank if all have detections.

    Returns:
        A sentence with the largest differences.

    Raises:
        ExportMismatchError: if they are more than `LIMITS` allow, or nothing is found at all.
    """
    expected = {name: _infer(predictor, image) for name, image in images.items()}
    if not any(map(len, expected.values())):
        raise ExportMismatchError(
            f"nothing is found in any of the {len(images)} images, which verifies nothing: give "
            "--images that have objects"
        )
    last = list(images)[-1]
    for value in (0.0, 127.0, 255.0) if all(map(len, expected.values())) else ():
        blank = torch.full_like(images[last], value)
        if not len(nothing := _infer(predictor, blank)):
            images, expected = {**images, last: blank}, {**expected, last: nothing}
            break
    largest: dict[str, float] = {}
    found = []
    for name, instances in expected.items():
        try:
            found.append(_as_instances(run(images[name]), instances.image_size))
        except Exception as error:  # a runtime's own kinds
            raise ExportMismatchError(f"{name}: {str(error).strip().splitlines()[0]}") from error
        for what, difference in _differences(name, instances, found[-1]):
            largest[what] = max(difference, largest.get(what, 0.0))
            if not difference <= LIMITS[what]:
                raise ExportMismatchError(
                    f"{name}: {what} differ by {difference:.2g}, more than {LIMITS[what]:g}"
                )
    ap = _average_precision(list(expected.values()), found)
    if not ap >= 100 - AP_LIMIT:
        raise ExportMismatchError(f"AP against the model's own detections is {ap:.2f}, must be 100")
    empty = sum(not len(instances) for instances in expected.values())
    without = f"{empty} of them" if empty else "none of them, blank ones included,"
    sizes = len({instances.image_size for instances in expected.values()})
    differences = ", ".join(f"{what} {value:.1g}" for what, value in largest.items())
    return (
        f"verified on {len(expected)} images of {sizes} sizes, {without} without detections: "
        f"largest differences: {differences}; AP {ap:.1f}"
    )


def _infer(predictor: Predictor, image: Tensor) -> Instances:
    model: Any = predictor.model
    with torch.no_grad():
        return model.inference([{"image": image}], do_postprocess=False)[0]


def _as_instances(outputs: dict[str, Tensor], size: tuple[int, int]) -> Instances:
    found = Instances(size, pred_boxes=Boxes(outputs["boxes"]), scores=outputs["scores"])
    found.pred_classes = outputs["classes"]
    if "masks" in outputs:
        found.pred_masks = outputs["masks"][:, None]
    if "keypoints" in outputs:
        found.pred_keypoints = outputs["keypoints"]
    return found


def _differences(name: str, expected: Instances, found: Instances) -> Iterator[tuple[str, float]]:
    """What differs, and how much; equal scores may come in any order.

    Raises:
        ExportMismatchError: if detections are missing, or of another class.
    """
    if len(expected) != len(found):
        raise ExportMismatchError(f"{name}: {len(found)} detections, the model has {len(expected)}")
    if not len(expected):
        return
    apart = (expected.pred_boxes.tensor[:, None] - found.pred_boxes.tensor).abs().amax(dim=2)
    apart[expected.pred_classes[:, None] != found.pred_classes] = math.inf
    distance, nearest = apart.min(dim=1)
    if distance.isinf().any() or len(nearest.unique()) < len(nearest):
        raise ExportMismatchError(f"{name}: the classes of the detections differ")
    found = found[nearest]
    yield "boxes", distance.max().item()
    yield "scores", (expected.scores - found.scores).abs().max().item()
    if expected.has("pred_masks"):
        yield "masks", (expected.pred_masks - found.pred_masks).abs().max().item()
    if expected.has("pred_keypoints"):
        moved = (expected.pred_keypoints - found.pred_keypoints).abs()
        yield "scores", moved[..., 2].max().item()
        is_elsewhere = moved[..., :2].amax(dim=2) > 10 * LIMITS["boxes"]
        yield "keypoints", max(0, int(is_elsewhere.sum()) - 1) / is_elsewhere.numel()


def _average_precision(expected: list[Instances], found: list[Instances]) -> float:
    """AP of the boxes, with those that the model finds as the truth."""
    truth, predictions = [], []
    for number, pair in enumerate(zip(expected, found), 1):
        fields = ("pred_boxes", "scores", "pred_classes")
        theirs, ours = (
            coco_results(Instances(i.image_size, **{f: i.get(f) for f in fields}), number)
            for i in pair
        )
        truth += [{**t, "area": t["bbox"][2] * t["bbox"][3], "iscrowd": 0} for t in theirs]
        predictions.append(pack(ours))
    ground_truth = {
        "images": [{"id": number} for number in range(1, len(expected) + 1)],
        "categories": [{"id": class_} for class_ in {t["category_id"] for t in truth}],
        "annotations": [{**t, "id": number} for number, t in enumerate(truth, 1)],
    }
    most = max(100, *(len(instances) for instances in expected))
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's table
        scored = evaluate_tasks(find_backend(), ground_truth, predictions, ["bbox"], [1, 10, most])
    return 100 * float(scored["bbox"].stats[0])
