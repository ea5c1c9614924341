"""COCO's AP on the fastest backend that is installed, a few categories at a time.

COCO's API needs a dict for each prediction: gigabytes for 5,000 images with 100 each. It scores
each category separately, so a few are unpacked at a time; the numbers are the same.

Images, categories and annotations are numbered from 1. COCO's code takes an object with id 0 for
unmatched, detectron2's compiled one fails on a negative id, and faster-coco-eval converts all ids
to integers. Images are in the order of their ids, so that ties between scores stay as they are.
"""

import contextlib
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

import detectron2
import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval, COCOeval_opt, COCOevalMaxDets
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mask_rcnn_plugin.data.annotation_rules import is_integer
from mask_rcnn_plugin.data.garbage import collection_paused
from mask_rcnn_plugin.evaluation.predictions import unpack

# What is scored at a time, in predictions and (image, category) pairs: a backend keeps a record of
# each pair too. A category that is larger makes a group alone.
_GROUP_SIZE = 100_000

_NO_MASK = {"size": [1, 1], "counts": "1"}  # one pixel, not of the object


class Backend(NamedTuple):
    """An implementation of COCO's API: its `COCO` and `COCOeval`.

    name: with the version, and what keeps a faster one from being used.
    """

    name: str
    coco: Callable[[], Any]
    coco_eval: Callable[[Any, Any, str], Any]


def find_backend(official: bool = False) -> Backend:
    """The fastest that is installed, or COCO's own; all of them give the same numbers.

    Returns:
        detectron2's compiled `COCOeval_opt`, else faster-coco-eval (1.8 or newer), else
        pycocotools.
    """
    pycocotools = Backend(f"pycocotools {version('pycocotools')}", COCO, COCOeval)
    if official:
        return pycocotools
    if COCOeval_opt is not COCOeval:  # the same where detectron2 lacks its extension
        return Backend(f"detectron2 {detectron2.__version__} COCOeval_opt", COCO, COCOeval_opt)
    try:
        import faster_coco_eval as faster
    except ImportError:
        return pycocotools
    name = f"faster-coco-eval {faster.__version__}"
    if tuple(int(n) for n in faster.__version__.split(".")[:2]) < (1, 8):
        return pycocotools._replace(name=f"{pycocotools.name} ({name} is older than 1.8)")
    return Backend(name, faster.COCO, faster.COCOeval_faster)


def evaluate_tasks(
    backend: Backend,
    ground_truth: dict[str, Any],
    predictions: Sequence[bytes],
    tasks: Collection[str],
    max_dets: list[int],
    oks_sigmas: Sequence[float] = (),
    image_ids: Collection[Any] | None = None,
) -> dict[str, SimpleNamespace]:
    """Score predictions. Prints COCO's twelve numbers of each task (ten for keypoints).

    Args:
        ground_truth: content of a COCO annotation file that `check_ground_truth` accepts.
        predictions: of each image, from `pack`.
        tasks: of "bbox", "segm", "keypoints".
        max_dets: three limits on the detections of an image and category, for "bbox" and "segm".
        oks_sigmas: one for each type of keypoint; needed for "keypoints".
        image_ids: score these images only.

    Returns:
        For each task, these attributes of a `COCOeval`: `params`, `eval["precision"]`,
        `eval["recall"]` and `stats` (0 to 1; -1: nothing to score), and `eval["scores"]` for
        objects of all sizes and the last limit, (IoU, recall, category). Categories are in the
        order of their ids.
    """
    numbers = {id_: n for n, id_ in enumerate(sorted(i["id"] for i in ground_truth["images"]), 1)}
    images = [{**image, "id": numbers[image["id"]]} for image in ground_truth["images"]]
    scored = sorted(numbers.values() if image_ids is None else {numbers[id_] for id_ in image_ids})
    categories = sorted(category["id"] for category in ground_truth["categories"])
    objects_of = defaultdict(list)
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] in numbers:  # else COCO skips it too
            objects_of[annotation["category_id"]].append(annotation)
    evaluated: dict[str, list[Any]] = {task: [] for task in tasks}
    # COCO's code tells each step.
    with collection_paused(), contextlib.redirect_stdout(io.StringIO()):
        parts, counts = _by_category(predictions, categories)
        for group in _groups(counts, len(images)):
            objects = [annotation for category in group for annotation in objects_of[category]]
            packed = [part for category in group for part in parts[category]]
            found = [prediction for part in packed for prediction in pickle.loads(part)]
            for task in tasks:
                coco_eval = backend.coco_eval(
                    _coco(backend, images, numbers, group, _truth(objects, task, len(oks_sigmas))),
                    _coco(backend, images, numbers, group, _detections(found, task, objects)),
                    task,
                )
                coco_eval.params.imgIds = scored
                coco_eval.params.catIds = list(range(1, len(group) + 1))
                if task == "keypoints":
                    coco_eval.params.kpt_oks_sigmas = np.array(oks_sigmas)
                else:
                    coco_eval.params.maxDets = list(max_dets)
                coco_eval.evaluate()
                coco_eval.accumulate()
                # Not all of `coco_eval`, which holds the predictions.
                kept = {key: coco_eval.eval[key] for key in ("precision", "recall")}
                kept["scores"] = coco_eval.eval["scores"][:, :, :, 0, -1].copy()
                evaluated[task].append((coco_eval.params, kept))
    return {task: _summary(results) for task, results in evaluated.items()}


def _by_category(
    images: Sequence[bytes], categories: list[Any]
) -> tuple[dict[Any, list[bytes]], dict[Any, int]]:
    """Of each category the predictions, pickled image by image, and how many they are."""
    parts: dict[Any, list[bytes]] = {category: [] for category in categories}
    counts = dict.fromkeys(categories, 0)
    for image in images:
        found = defaultdict(list)
        for prediction in unpack(image):
            found[prediction["category_id"]].append(prediction)
        for category in found.keys() & parts.keys():  # COCO skips others too
            parts[category].append(pickle.dumps(found[category], pickle.HIGHEST_PROTOCOL))
            counts[category] += len(found[category])
    return parts, counts


def _groups(counts: Mapping[Any, int], num_images: int) -> list[list[Any]]:
    """Neighbouring categories that come to `_GROUP_SIZE` or less together."""
    groups: list[list[Any]] = []
    room = -1
    for category, count in counts.items():
        size = count + num_images
        if size > room:
            groups.append([])
            room = _GROUP_SIZE
        groups[-1].append(category)
        room -= size
    return groups


def _truth(
    annotations: list[dict[str, Any]], task: str, num_keypoints: int
) -> list[dict[str, Any]]:
    """Copies, as COCO's API writes into its dicts; with keypoints each, if those are scored."""
    copies = [dict(annotation) for annotation in annotations]
    if task == "keypoints":
        for truth in copies:
            keypoints = truth.get("keypoints") or [0] * 3 * num_keypoints
            # An integer of more than 64 bits would make objects of NumPy's numbers.
            truth["keypoints"] = [float(x) for x in keypoints]
            truth["num_keypoints"] = count_keypoints(truth)
    return copies


def count_keypoints(annotation: Mapping[str, Any]) -> int:
    """How many are labelled; keypoint AP leaves out instances that have none."""
    visible = (annotation.get("keypoints") or [])[2::3]
    stated: Any = annotation.get("num_keypoints")
    return int(stated) if is_integer(stated) else sum(v > 0 for v in visible)


def _detections(
    predictions: list[dict[str, Any]], task: str, objects: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Predictions with what COCO's `loadRes` adds.

    The area, by which COCO tells small from large, is the mask's where masks are scored, else the
    box's. A mask is only kept where it is compared to objects, in an image that has some.
    """
    if task != "segm":
        return [{**p, "iscrowd": 0, "area": p["bbox"][2] * p["bbox"][3]} for p in predictions]
    compared = {(a["image_id"], a["category_id"]) for a in objects}
    detections = []
    for prediction in predictions:
        # One by one: pycocotools' `area` keeps the length of a list in a uint8.
        area = int(coco_mask.area(prediction["segmentation"]))
        detection = {**prediction, "iscrowd": 0, "area": area}
        if (prediction["image_id"], prediction["category_id"]) not in compared:
            detection["segmentation"] = _NO_MASK
        detections.append(detection)
    return detections


def _coco(
    backend: Backend,
    images: list[dict[str, Any]],
    numbers: Mapping[Any, int],
    categories: list[Any],
    annotations: list[dict[str, Any]],
) -> Any:
    """The backend's `COCO` of annotations; their ids, images and categories become numbers."""
    category_numbers = {id_: n for n, id_ in enumerate(categories, 1)}
    for n, annotation in enumerate(annotations, 1):
        annotation["id"] = n
        annotation["image_id"] = numbers[annotation["image_id"]]
        annotation["category_id"] = category_numbers[annotation["category_id"]]
    coco = backend.coco()
    coco.dataset = {
        "images": images,
        "categories": [{"id": n} for n in category_numbers.values()],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _summary(evaluated: list[tuple[Any, dict[str, Any]]]) -> SimpleNamespace:
    """One `COCOeval`, as far as it is read, of the categories' groups."""
    merged = {
        key: np.concatenate([result[key] for _, result in evaluated], axis)
        for key, axis in (("precision", 2), ("recall", 1), ("scores", 2))  # of the categories
    }
    summary = SimpleNamespace(params=evaluated[0][0], eval=merged)
    # pycocotools' own summary knows no limit but 100 detections; there this one equals it.
    COCOevalMaxDets.summarize(summary)
    return summary
