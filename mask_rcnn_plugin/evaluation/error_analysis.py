"""What a model gets wrong: its curves by class, and every missed, false or confused instance.

Curves and thresholds are read from the arrays of COCO's evaluation, so that the area under a
printed curve is the AP. Instances are matched as AP matches them at an IoU of 0.5; what is left is
matched across classes.
"""

import math
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mask_rcnn_plugin.evaluation.average_precision import count_keypoints
from mask_rcnn_plugin.evaluation.predictions import unpack

MATCHING_IOU = 0.5
_IOU_75 = 5  # of COCO's thresholds 0.5, 0.55, ... 0.95

KINDS = ("confused", "false", "missed")  # of mistakes

Row = dict[str, Any]  # of a table: {column: value}


class Mistake(NamedTuple):
    """An instance that is missed, false or taken for another class.

    kind: "confused" has both classes; "missed" lacks the predicted one; "false" has as `truth` the
        class of the object that it overlaps most, "" if it overlaps none.
    weight: how bad it is among its kind. A confident prediction that fits an object of another
        class, a confident false one and an object that fills its image come first.
    score, iou: of the prediction, and with the object; None for a missed one.
    box: of the prediction, or the missed object; XYWH, pixels.
    """

    kind: str
    weight: float
    image_id: Any
    truth: str
    predicted: str
    score: float | None
    iou: float | None
    box: list[float]


def class_names(coco: COCO) -> list[str]:
    """Names of the categories in the order of their ids, as COCO's arrays have them."""
    return [str(coco.cats[id_]["name"]) for id_ in sorted(coco.cats)]


def class_table(task: str, scored: SimpleNamespace, coco: COCO) -> list[Row]:
    """AP and AR by size and the threshold with the best F1, first of all classes, then of each.

    Args:
        scored: the task's result of `evaluate_tasks`.

    Returns:
        AP and AR in points, means over the IoUs but for AP50 and AP75; s, m, l: COCO's sizes. At
        an IoU of 0.5 (keypoints: an OKS), the least score that gives the best F1, and F1, precision
        and recall there, 0 to 1; recall is rounded down to a hundredth. NaN: nothing to score, or
        no threshold, as nothing is found. Crowds are no instances, nor, for keypoints, are
        objects without any.
    """
    precision, recall = scored.eval["precision"][..., -1], scored.eval["recall"][..., -1]
    areas = {label[0] if a else "": a for a, label in enumerate(scored.params.areaRngLbl)}
    objects = [a for a in coco.anns.values() if not a["iscrowd"] and a["image_id"] in coco.imgs]
    if task == "keypoints":
        objects = [a for a in objects if count_keypoints(a)]
    counts = Counter(a["category_id"] for a in objects)
    classes = [(name, counts[id_]) for name, id_ in zip(class_names(coco), sorted(coco.cats))]
    rows = []
    for k, (name, count) in enumerate(
        [("(all classes)", sum(c for _, c in classes)), *classes], -1
    ):
        which = slice(None) if k < 0 else k
        row = {"task": task, "class": name, "instances": count}
        for metric, iou in (("AP", slice(None)), ("AP50", 0), ("AP75", _IOU_75)):
            row[metric] = _points(precision[iou, :, which, 0])
        row |= {f"AP{size}": _points(precision[:, :, which, a]) for size, a in areas.items()}
        row |= {f"AR{size}": _points(recall[:, which, a]) for size, a in areas.items()}
        row |= dict.fromkeys(("threshold", "F1", "precision", "recall"), math.nan)
        if k >= 0 and (points := curve(scored, k))["F1_50"].any():
            best = points["F1_50"].argmax()
            columns = ("score_50", "F1_50", "precision_50", "recall")
            row.update(zip(list(row)[-4:], (float(points[c][best]) for c in columns)))
        rows.append(row)
    return rows


def _points(values: np.ndarray) -> float:
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else math.nan


def curve(scored: SimpleNamespace, k: int) -> dict[str, np.ndarray]:
    """The k-th class's precision at the 101 recalls that make its AP; none if it has no instances.

    The mean of `precision`, itself a mean over the IoUs, is the AP, that of `precision_50` AP50.
    `score_50` is the least score that counts for the recall at an IoU of 0.5, 0 where none does.
    """
    precision = scored.eval["precision"][:, :, k, 0, -1]  # (IoU, recall)
    recall = np.asarray(scored.params.recThrs)
    columns = {
        "recall": recall,
        "precision": precision.mean(axis=0),
        "precision_50": precision[0],
        "precision_75": precision[_IOU_75],
        "score_50": scored.eval["scores"][0, :, k],
        "F1_50": 2 * precision[0] * recall / np.maximum(precision[0] + recall, 1e-12),
    }
    return {name: column[precision[0] > -1] for name, column in columns.items()}


def reaching(packed: bytes | None, thresholds: Mapping[Any, float]) -> list[dict[str, Any]]:
    """An image's predictions that reach the threshold of their category, where it has one."""
    predictions = unpack(packed) if packed else []
    return [p for p in predictions if p["score"] >= thresholds.get(p["category_id"], math.inf)]


def find_mistakes(
    coco: COCO, predictions: Mapping[Any, bytes], thresholds: Mapping[Any, float], task: str
) -> tuple[np.ndarray, list[Mistake], int]:
    """Compare the predictions that reach their class's threshold with the ground truth.

    Args:
        predictions: {image id: packed predictions}.
        thresholds: of the score, {category id: threshold}.
        task: "segm" compares masks, the others boxes; "keypoints" takes objects without any for
            crowds, as AP does.

    Returns:
        (K + 1, K + 1) counts of instances: a row is the object's class, the last one "no object", a
            column the predicted class, the last one "missed";
        the mistakes by kind, the worst first;
        the number of predictions that lie on a crowd of their class and so count nowhere, as in AP.
    """
    names = [*class_names(coco), ""]
    none = len(names) - 1
    classes = {id_: k for k, id_ in enumerate(sorted(coco.cats))}
    matrix = np.zeros((none + 1, none + 1), dtype=np.int64)
    mistakes: list[Mistake] = []
    on_crowds = 0
    for image_id, image in coco.imgs.items():
        objects = [a for a in coco.imgToAnns.get(image_id, []) if a["category_id"] in classes]
        detections = reaching(predictions.get(image_id), thresholds)
        true, predicted = (
            np.array([classes[x["category_id"]] for x in items], dtype=int)
            for items in (objects, detections)
        )
        crowd = np.array(
            [a["iscrowd"] or (task == "keypoints" and not count_keypoints(a)) for a in objects],
            dtype=bool,
        )
        iou = np.zeros((len(detections), len(objects)))
        if iou.size:  # with a crowd, the part of the detection that lies on it
            found = [p["segmentation" if task == "segm" else "bbox"] for p in detections]
            truth = [coco.annToRLE(a) if task == "segm" else a["bbox"] for a in objects]
            iou = np.nan_to_num(coco_mask.iou(found, truth, crowd.tolist()))
        same = predicted[:, None] == true
        on_crowd = ((iou >= MATCHING_IOU) & same & crowd).any(axis=1)
        iou[:, crowd] = 0
        object_of = _match(iou, same, [p["score"] for p in detections], on_crowd)
        for d, detection in enumerate(detections):
            matched = d in object_of
            if on_crowd[d] and not matched:
                on_crowds += 1
                continue
            row = true[object_of[d]] if matched else none
            matrix[row, predicted[d]] += 1
            if row == predicted[d]:
                continue
            g = object_of[d] if matched else int(iou[d].argmax()) if iou[d].any() else None
            overlap, score = 0.0 if g is None else float(iou[d, g]), detection["score"]
            mistakes.append(
                Mistake(
                    kind="confused" if matched else "false",
                    weight=score * overlap if matched else score,
                    image_id=image_id,
                    truth="" if g is None else names[true[g]],
                    predicted=names[predicted[d]],
                    score=score,
                    iou=overlap,
                    box=detection["bbox"],
                )
            )
        for g in set(np.flatnonzero(~crowd).tolist()) - set(object_of.values()):
            matrix[true[g], none] += 1
            size = objects[g]["area"] / (image["height"] * image["width"])
            box = objects[g]["bbox"]
            mistakes.append(Mistake("missed", size, image_id, names[true[g]], "", None, None, box))
    mistakes.sort(key=lambda m: (KINDS.index(m.kind), -m.weight))
    return matrix, mistakes, on_crowds


def _match(
    iou: np.ndarray, same: np.ndarray, scores: list[float], on_crowd: np.ndarray
) -> dict[int, int]:
    """{detection: object}, one to one.

    First among those of the same class, as COCO does: by score, each with the object it fits best.
    Then the others, but for those on a crowd of their class.
    """
    d, g = np.nonzero((iou >= MATCHING_IOU) & (same | ~on_crowd[:, None]))
    order = np.lexsort((-iou[d, g], d, -np.array(scores)[d], ~same[d, g]))
    object_of: dict[int, int] = {}
    taken = set()
    for detection, object_ in zip(d[order].tolist(), g[order].tolist()):
        if detection not in object_of and object_ not in taken:
            object_of[detection] = object_
            taken.add(object_)
    return object_of
