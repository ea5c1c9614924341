"""A made-up COCO ground truth and a detector's outputs for it, of any size and from a seed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.fast.mask_rle import RLEMasks

# An image's model input and output, as evaluators take them.
Prediction = tuple[dict[str, Any], dict[str, Any]]

_HEIGHT, _WIDTH = 480, 640  # pixels; most of COCO's
_VERTICES = 24  # of a mask's polygon, about COCO's mean
_CROWDS = 0.01  # of the objects, as in COCO


def made_up_ground_truth(
    images: int = 5_000, objects: int = 36_000, categories: int = 80, seed: int = 0
) -> dict[str, Any]:
    """A COCO-format ground truth, by default of the size of COCO's minival.

    Masks are polygons, a hundredth of them crowds in RLE. Categories follow Zipf's law, and images
    differ in their number of objects; some have none. Ids count from 1, those of categories in
    steps of two, so that they are not the contiguous ones.
    """
    rng = np.random.default_rng([seed, 0])
    crowdedness = rng.gamma(1.0, size=images)
    owners = np.sort(rng.choice(images, size=objects, p=crowdedness / crowdedness.sum()))
    boxes = _draw_boxes(rng, objects)
    kinds = _draw_categories(rng, objects, categories)
    polygons = _outlines(boxes, kinds).reshape(objects, -1).round(2)
    crowds = rng.random(objects) < _CROWDS
    annotations = []
    for i in range(objects):
        segmentation: Any = [polygons[i].tolist()]
        (rle,) = coco_mask.frPyObjects(segmentation, _HEIGHT, _WIDTH)
        if crowds[i]:
            segmentation = as_text(rle)
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
    ground_truth: dict[str, Any], detections: int = 100
) -> Iterator[Prediction]:
    """A detector's outputs for a ground truth, one image at a time; nothing is kept.

    Three for each object, but at most half of an image's, are jittered objects, nine in ten of them
    with the object's category; the others lie anywhere and score lower. An image's detections do
    not depend on the other images. Masks are `RLEMasks`.
    """
    categories = len(ground_truth["categories"])
    objects: dict[int, list[dict[str, Any]]] = {i["id"]: [] for i in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for image in ground_truth["images"]:
        rng = np.random.default_rng([0, 1, image["id"]])
        boxes, kinds = _draw_boxes(rng, detections), _draw_categories(rng, detections, categories)
        scores = rng.beta(1, 8, size=detections)
        found = objects[image["id"]]
        n = min(3 * len(found), detections // 2)
        if n:
            chosen = [found[i] for i in rng.integers(len(found), size=n)]
            true = np.array([a["bbox"] for a in chosen])
            jittered = true + rng.normal(0, 0.08, size=(n, 4)) * true[:, [2, 3, 2, 3]]
            # In the image, and at least a pixel wide and high.
            low = np.clip(jittered[:, :2], 0, (_WIDTH - 1, _HEIGHT - 1))
            high = np.clip(jittered[:, :2] + jittered[:, 2:], low + 1, (_WIDTH, _HEIGHT))
            boxes[:n] = np.concatenate([low, high - low], axis=1)
            right = rng.random(n) < 0.9
            true_kinds = np.array([(a["category_id"] - 1) // 2 for a in chosen])
            kinds[:n] = np.where(right, true_kinds, kinds[:n])
            scores[:n] = rng.beta(4, 2, size=n)
        outlines = _outlines(boxes, kinds).reshape(detections, -1).tolist()
        rles = coco_mask.frPyObjects(outlines, _HEIGHT, _WIDTH)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((_HEIGHT, _WIDTH))
        instances.pred_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.scores = torch.from_numpy(scores).float()
        instances.pred_classes = torch.from_numpy(kinds)
        instances.pred_masks = RLEMasks([as_text(rle) for rle in rles])
        inputs = {"image_id": image["id"], "height": _HEIGHT, "width": _WIDTH}
        yield inputs, {"instances": instances}


def _draw_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) boxes anywhere in the image, XYWH pixels, sides log-uniform from 8 to 400."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), size=(n, 1)) + rng.normal(0, 0.3, (n, 2)))
    sides = np.minimum(sides, (_WIDTH, _HEIGHT))
    corners = rng.random((n, 2)) * ((_WIDTH, _HEIGHT) - sides)
    return np.concatenate([corners, sides], axis=1)


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


def as_text(rle: dict[str, Any]) -> dict[str, Any]:
    """pycocotools' RLE as JSON can hold it."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
