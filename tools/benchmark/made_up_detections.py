"""COCO evaluation on made-up data: a ground truth, its detections, and the stages to measure.

Sizes are those of COCO's minival by default: 5,000 images, 36,000 objects, 80 categories, 100
detections an image. Everything follows from the seed, image by image:

    truth = made_up_ground_truth()
    dataset = register_made_up(folder, truth)
    results = our_evaluator(dataset, made_up_predictions(truth)).evaluate()  # or stock_evaluator
"""

import gc
import json
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator, Task, coco_results
from mask_rcnn_plugin.fast.mask_rle import RLEMasks

TASKS: tuple[Task, ...] = ("bbox", "segm")

# An image's model input and output, as evaluators take them.
Prediction = tuple[dict[str, Any], dict[str, Any]]

_HEIGHT, _WIDTH = 480, 640  # pixels; most of COCO's
_VERTICES = 24  # of a mask's polygon, about COCO's mean
_CROWDS = 0.01  # of the objects, as in COCO


def made_up_ground_truth(
    images: int = 5_000, objects: int = 36_000, categories: int = 80, seed: int = 0
) -> dict[str, Any]:
    """A COCO-format ground truth.

    Masks are polygons with one part or two, a hundredth of them crowds in uncompressed RLE. Sides
    of boxes are log-uniform from 8 to 400 pixels, categories follow Zipf's law, and images differ
    in their number of objects; some have none.

    Args:
        images: number of images, 480 x 640 pixels each.
        objects: number of objects in all of them.
        categories: number of categories.
        seed: the same seed gives the same ground truth.

    Returns:
        What a COCO annotation file holds: {"images", "annotations", "categories"}. Ids count from
        1, those of categories in steps of two, so that they are not the contiguous ones.
    """
    rng = np.random.default_rng([seed, 0])
    crowdedness = rng.gamma(1.0, size=images)
    owners = np.sort(rng.choice(images, size=objects, p=crowdedness / crowdedness.sum()))
    boxes = _draw_boxes(rng, objects)
    kinds = _draw_categories(rng, objects, categories)
    polygons = _outlines(boxes, kinds)
    crowds = rng.random(objects) < _CROWDS
    annotations = []
    for i in range(objects):
        # Of two parts: the outline and a copy of it, shrunken towards its upper left corner.
        parts = [polygons[i]] if i % 10 else [polygons[i], _shrink(polygons[i])]
        segmentation: Any = [part.ravel().round(2).tolist() for part in parts]
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, _HEIGHT, _WIDTH))
        if crowds[i]:
            segmentation = _uncompressed(rle)
        annotations.append(
            {
                "id": i + 1,
                "image_id": int(owners[i]) + 1,
                "category_id": 2 * int(kinds[i]) + 1,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": float(coco_mask.area(rle)),
                "iscrowd": int(crowds[i]),
                "segmentation": segmentation,
            }
        )
    return {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1}.jpg", "height": _HEIGHT, "width": _WIDTH}
            for i in range(images)
        ],
        "annotations": annotations,
        "categories": [{"id": 2 * k + 1, "name": f"category {k}"} for k in range(categories)],
    }


def made_up_predictions(
    ground_truth: dict[str, Any], detections: int = 100, seed: int = 0
) -> Iterator[Prediction]:
    """A detector's outputs for a ground truth, one image at a time; nothing is kept.

    Three for each object, but at most half of an image's, are jittered objects, nine in ten of them
    with the object's category; the others lie anywhere and score lower.

    Args:
        ground_truth: from `made_up_ground_truth`.
        detections: number of detections in each image.
        seed: the same seed gives the same detections, for each image apart.

    Yields:
        For each image the arguments, without the lists, of an evaluator's `process()`: its
        {"image_id", "height", "width"} and {"instances": detectron2's `Instances` with pred_boxes
        (detections, 4), XYXY pixels, scores, pred_classes and pred_masks, which are `RLEMasks`}.
    """
    categories = len(ground_truth["categories"])
    objects: dict[int, list[dict[str, Any]]] = {i["id"]: [] for i in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for image in ground_truth["images"]:
        rng = np.random.default_rng([seed, 1, image["id"]])
        boxes, kinds = _draw_boxes(rng, detections), _draw_categories(rng, detections, categories)
        scores = rng.beta(1, 8, size=detections)
        found = objects[image["id"]]
        n = min(3 * len(found), detections // 2)
        if n:
            chosen = [found[i] for i in rng.integers(len(found), size=n)]
            true = np.array([a["bbox"] for a in chosen])
            noise = rng.normal(0, 0.08, size=(n, 4)) * true[:, [2, 3, 2, 3]]
            boxes[:n] = _inside(true + noise)
            right = rng.random(n) < 0.9
            true_kinds = np.array([(a["category_id"] - 1) // 2 for a in chosen])
            kinds[:n] = np.where(right, true_kinds, kinds[:n])
            scores[:n] = rng.beta(4, 2, size=n)
        outlines = _outlines(boxes, kinds).reshape(detections, -1).tolist()
        rles = coco_mask.frPyObjects(outlines, _HEIGHT, _WIDTH) if detections else []
        for rle in rles:
            rle["counts"] = rle["counts"].decode("ascii")
        instances = Instances((_HEIGHT, _WIDTH))
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.scores = torch.from_numpy(scores).float()
        instances.pred_classes = torch.from_numpy(kinds)
        instances.pred_masks = RLEMasks(rles)
        yield (
            {"image_id": image["id"], "height": _HEIGHT, "width": _WIDTH},
            {"instances": instances},
        )


def register_made_up(folder: Path, ground_truth: dict[str, Any]) -> str:
    """Write a ground truth to `folder`/made_up.json and register it with detectron2.

    Returns:
        Its name in detectron2's catalogs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "made_up.json"
    file.write_text(json.dumps(ground_truth))
    name = register_coco_dataset(str(file), str(folder))
    DatasetCatalog.get(name)  # detectron2 learns the categories' ids from loading it
    return name


def stock_evaluator(
    dataset: str, predictions: Iterable[Prediction], tasks: tuple[str, ...] = TASKS
) -> COCOEvaluator:
    """detectron2's `COCOEvaluator` on pycocotools, ready for `evaluate()`.

    It is given encoded masks, not bitmaps: what `process()` takes to encode them is no part of a
    comparison of backends.

    Args:
        dataset: from `register_made_up`.
        predictions: from `made_up_predictions`.
        tasks: of "bbox", "segm".
    """
    evaluator = COCOEvaluator(dataset, tasks, distributed=False, use_fast_impl=False)
    evaluator._predictions = [
        {
            "image_id": image["image_id"],
            "instances": coco_results(output["instances"], image["image_id"]),
        }
        for image, output in predictions
    ]
    return evaluator


def our_evaluator(
    dataset: str,
    predictions: Iterable[Prediction],
    tasks: tuple[Task, ...] = TASKS,
    official: bool = False,
) -> MaskRCNNCOCOEvaluator:
    """The plugin's evaluator with all predictions processed, ready for `evaluate()`.

    Args:
        dataset: from `register_made_up`.
        predictions: from `made_up_predictions`.
        tasks: of "bbox", "segm".
        official: pycocotools even where a faster backend is installed.
    """
    evaluator = MaskRCNNCOCOEvaluator(dataset, tasks, distributed=False, official=official)
    evaluator.reset()
    for image, output in predictions:
        evaluator.process([image], [output])
    return evaluator


def process_memory(
    dataset: str, predictions: Iterable[Prediction], every: int = 500
) -> list[dict[str, float]]:
    """How the memory of a process grows while the plugin's evaluator takes images.

    The predictions are made up on the way and thrown away, so the growth is what the evaluator
    keeps.

    Args:
        dataset: from `register_made_up`.
        predictions: from `made_up_predictions`.
        every: images between two measurements.

    Returns:
        One dict a measurement: "images" taken so far; "rss_mb", the resident memory above that
        before the first image, in MB, which leaves out what fits in memory freed before; "kept_mb",
        the packed predictions themselves, in MB; "seconds" spent in `process()`.
    """
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS, distributed=False)
    evaluator.reset()
    measured, seconds = [], 0.0
    gc.collect()
    before = resident_mb()
    for i, (image, output) in enumerate(predictions, start=1):
        start = time.perf_counter()
        evaluator.process([image], [output])
        seconds += time.perf_counter() - start
        if i % every == 0:
            kept = sum(len(image["instances"]) for image in evaluator._predictions) / 1e6
            rss = resident_mb() - before
            measured.append({"images": i, "rss_mb": rss, "kept_mb": kept, "seconds": seconds})
    return measured


def resident_mb() -> float:
    """Resident memory of this process, in MB (10^6 bytes); Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _draw_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) boxes anywhere in the image, XYWH pixels, sides log-uniform from 8 to 400."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), size=(n, 1)) + rng.normal(0, 0.3, (n, 2)))
    sides = np.minimum(sides, (_WIDTH, _HEIGHT))
    corners = rng.random((n, 2)) * ((_WIDTH, _HEIGHT) - sides)
    return np.concatenate([corners, sides], axis=1)


def _inside(boxes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4), XYWH, clipped to the image and at least a pixel wide and high."""
    low = np.clip(boxes[:, :2], 0, (_WIDTH - 1, _HEIGHT - 1))
    high = np.clip(boxes[:, :2] + boxes[:, 2:], low + 1, (_WIDTH, _HEIGHT))
    return np.concatenate([low, high - low], axis=1)


def _draw_categories(rng: np.random.Generator, n: int, categories: int) -> np.ndarray:
    """n contiguous category ids by Zipf's law."""
    weights = 1 / np.arange(1, categories + 1)
    return rng.choice(categories, size=n, p=weights / weights.sum())


def _outlines(boxes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """A closed curve in each box, of its category's shape: (n, 24, 2) x, y in pixels."""
    angles = np.linspace(0, 2 * np.pi, _VERTICES, endpoint=False)
    radii = 0.85 + 0.15 * np.sin(3 * angles + kinds[:, None])
    unit = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)
    return boxes[:, None, :2] + (unit + 1) / 2 * boxes[:, None, 2:]


def _shrink(outline: np.ndarray) -> np.ndarray:
    corner = outline.min(axis=0)
    return corner + (outline - corner) / 4


def _uncompressed(rle: dict[str, Any]) -> dict[str, Any]:
    """A COCO RLE with its runs as a list of numbers, the first of them of zeros: no outline reaches
    into the first pixel, the image's corner."""
    pixels = coco_mask.decode(rle).ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    return {
        "size": list(rle["size"]),
        "counts": np.diff([0, *changes, len(pixels)]).tolist(),
    }
