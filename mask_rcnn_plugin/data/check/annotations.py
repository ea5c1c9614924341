"""What can be found in one annotation, and what can be put right in it."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from mask_rcnn_plugin.data.annotation_rules import (
    Fault,
    annotation_faults,
    are_finite,
    are_numbers,
    rle_counts,
    shown,
)

Annotation = dict[str, Any]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in image pixels

_MAX_RASTER = 2**28  # pixels: a larger image's polygons are measured without drawing them
UNFIT_KEYPOINTS = {"keypoint-format", "keypoint-count", "keypoint-other"}
_BOX_FAULTS = {"box-missing", "box-format", "box-negative", "box-empty", "box-outside"}
_AREA_FAULTS = {"area-format", "area-missing"}
# What `repair` may mend; any other error in an annotation means to drop it.
REPAIRABLE = {*_BOX_FAULTS, *_AREA_FAULTS, *UNFIT_KEYPOINTS}


@dataclass
class Context:
    """What an annotation is seen against.

    Attributes:
        images: width and height by id.
        categories: whether each has keypoints, by id; None: others than the data set's.
        num_keypoints: of the categories that have any; None if none has.
        needs_mask: whether all must have a segmentation, crowds too: scoring compares with them.
    """

    images: dict[int, tuple[int, int]]
    categories: dict[int, bool | None]
    num_keypoints: int | None = None
    needs_mask: bool = False


def inspect(annotation: Any, context: Context) -> list[Fault]:
    """All findings about one annotation but those that take others to see."""
    if not isinstance(annotation, dict):
        return [("annotation-format", f"annotation is {shown(annotation)}")]
    for key in ("id", "image_id", "category_id"):
        value = annotation.get(key)
        if type(value) is not int or not -(2**63) <= value < 2**63:
            return [("annotation-format", f"{key} is {shown(value)}")]
    size = context.images.get(annotation["image_id"])
    if size is None:
        return [("unknown-image", f"image_id {annotation['image_id']}")]
    findings = []
    if annotation["category_id"] not in context.categories:
        findings.append(("unknown-category", f"category_id {annotation['category_id']}"))
    if annotation.get("ignore", 0) != 0:
        findings.append(("ignore-set", f"ignore is {shown(annotation['ignore'])}"))
    if annotation.get("iscrowd", 0) not in (0, 1):
        findings.append(("iscrowd-format", f"iscrowd is {shown(annotation['iscrowd'])}"))
    loaded = _without_unusable_polygons(annotation)
    if loaded is not annotation:
        findings.append(("polygon-dropped", ""))
    faults = list(
        annotation_faults(loaded, *size, context.num_keypoints, needs_mask=context.needs_mask)
    )
    if loaded.get("keypoints") and context.categories.get(annotation["category_id"], False) is None:
        faults.append(("keypoint-other", ""))
    findings += faults
    findings += _extras(loaded, size, {kind for kind, _ in faults})
    if loaded.get("keypoints"):
        if not any(kind in UNFIT_KEYPOINTS for kind, _ in faults):
            findings += _keypoint_extras(loaded, size)
    elif context.categories.get(annotation["category_id"]) and not annotation.get("iscrowd"):
        findings.append(("keypoint-missing", ""))
    return findings


def repair(annotation: Annotation, found: set[str], size: tuple[int, int]) -> Annotation:
    """A copy in which what can be computed anew is right.

    Box and area come from the mask where they are broken or missing, unusable polygons beside
    usable ones go, as do unfit keypoints; num_keypoints is recounted.

    Args:
        annotation: one without errors but those of `REPAIRABLE`.
        found: the kinds that `inspect` found in it.
        size: width and height of its image.
    """
    mended = dict(_without_unusable_polygons(annotation))
    mask = measure(mended.get("segmentation"), size, exactly=True)
    if mask is not None and mask[0] > 0:
        x0, y0, x1, y1 = mask[1]
        if found & _BOX_FAULTS:
            mended["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if found & _AREA_FAULTS:
            mended["area"] = mask[0]
    elif found & _AREA_FAULTS and not found & _BOX_FAULTS:
        mended["area"] = mended["bbox"][2] * mended["bbox"][3]
    if found & UNFIT_KEYPOINTS:
        mended.pop("keypoints")
        mended.pop("num_keypoints", None)
    elif "num-keypoints" in found:
        mended["num_keypoints"] = sum(v > 0 for v in mended["keypoints"][2::3])
    return mended


def measure(
    segmentation: Any, size: tuple[int, int], *, exactly: bool = False
) -> tuple[float, Box] | None:
    """Area and box of a sound mask, in pixels; None without a mask.

    Args:
        segmentation: polygons or RLE without faults.
        size: width and height of the image.
        exactly: draw the polygons, as overlapping ones need, rather than sum their areas up.
    """
    width, height = size
    if isinstance(segmentation, dict):
        counts = rle_counts(segmentation["counts"])
        return None if counts is None else _measure_runs(counts, height)
    if not segmentation:
        return None
    area, lows, highs = 0.0, [], []
    for polygon in segmentation:
        xs, ys = polygon[0::2], polygon[1::2]
        area += abs(
            sum(map(operator.mul, xs, [*ys[1:], ys[0]]))
            - sum(map(operator.mul, ys, [*xs[1:], xs[0]]))
        )
        lows.append((min(xs), min(ys)))
        highs.append((max(xs), max(ys)))
    area /= 2
    x0, y0 = (max(min(low), 0) for low in zip(*lows))
    x1, y1 = (min(max(high), side) for high, side in zip(zip(*highs), size))
    if exactly and width * height <= _MAX_RASTER:
        area = float(mask_util.area(mask_util.merge(_drawn(segmentation, size))))
    return area, (x0, y0, x1, y1)


def _extras(annotation: Annotation, size: tuple[int, int], faults: set[str]) -> list[Fault]:
    """Doubts about box, mask and area, as far as these have no faults."""
    width, height = size
    findings: list[Fault] = []
    segmentation = annotation.get("segmentation")
    mask = None
    if not any(kind.startswith(("mask-", "polygon-", "rle-", "non-")) for kind in faults):
        mask = measure(segmentation, size)
        if isinstance(segmentation, list) and segmentation:
            if any(
                min(p) < -1 or max(p[0::2]) > width + 1 or max(p[1::2]) > height + 1
                for p in segmentation
            ):
                findings.append(("mask-partly-outside", ""))
            if annotation.get("iscrowd"):
                findings.append(("crowd-polygon", f"{len(segmentation)} polygons"))
    if not faults & {*_BOX_FAULTS, "non-finite"}:
        x, y, w, h = annotation["bbox"]
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            text = f"bbox {shown(annotation['bbox'])} in {width} x {height}"
            findings.append(("box-partly-outside", text))
        if w < 1 or h < 1:
            findings.append(("box-small", f"bbox {shown(annotation['bbox'])}"))
        if mask is not None and mask[0] > 0:
            x0, y0, x1, y1 = mask[1]
            slack_x, slack_y = 2 + 0.05 * (x1 - x0), 2 + 0.05 * (y1 - y0)
            right, bottom = min(x + w, width), min(y + h, height)
            if (
                max(abs(max(x, 0) - x0), abs(right - x1)) > slack_x
                or max(abs(max(y, 0) - y0), abs(bottom - y1)) > slack_y
            ):
                seen = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
                text = f"bbox {shown(annotation['bbox'])}, mask over {seen}"
                findings.append(("box-contradicts", text))
    area = annotation.get("area")
    if area is None:
        findings.append(("area-missing", ""))
    elif not are_numbers([area]) or not are_finite([area]):
        findings.append(("area-format", f"area is {shown(area)}"))
    elif mask is not None:
        if abs(area - mask[0]) > _slack(mask[0]):  # overlapping polygons are to count once
            mask = measure(segmentation, size, exactly=True)
        if mask is not None and abs(area - mask[0]) > _slack(mask[0]):
            findings.append(("area-contradicts", f"area {shown(area)}, mask {mask[0]:.0f}"))
    return findings


def _slack(area: float) -> float:
    return 10 + 0.1 * area


def _keypoint_extras(annotation: Annotation, size: tuple[int, int]) -> list[Fault]:
    width, height = size
    findings: list[Fault] = []
    keypoints = annotation["keypoints"]
    xs, ys, visibility = keypoints[0::3], keypoints[1::3], keypoints[2::3]
    if not set(visibility) <= {0, 1, 2}:
        findings.append(("keypoint-visibility", f"v is {shown(visibility)}"))
    if any(
        v > 0 and not (-1 <= x <= width and -1 <= y <= height)
        for x, y, v in zip(xs, ys, visibility)
    ):
        findings.append(("keypoint-outside", ""))
    labelled = sum(v > 0 for v in visibility)
    stated = annotation.get("num_keypoints", 0)  # as the evaluation takes it
    if stated != labelled:
        findings.append(("num-keypoints", f"num_keypoints {shown(stated)}, labelled {labelled}"))
    return findings


def _without_unusable_polygons(annotation: Annotation) -> Annotation:
    """Without polygons that detectron2's loader drops, if it keeps another one."""
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or not all(isinstance(p, list) for p in polygons):
        return annotation
    if all(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
        return annotation
    usable = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    return {**annotation, "segmentation": usable} if usable else annotation


def _drawn(polygons: list[list[float]], size: tuple[int, int]) -> Any:
    width, height = size
    return mask_util.frPyObjects([np.asarray(p, np.float64) for p in polygons], height, width)


def _measure_runs(counts: Any, height: int) -> tuple[float, Box]:
    ends = np.cumsum(counts)
    stops = ends[1::2]
    starts = ends[0::2][: len(stops)]
    kept = stops > starts
    starts, last = starts[kept], stops[kept] - 1
    if len(starts) == 0:
        return 0.0, (0, 0, 0, 0)
    if (starts // height != last // height).any():  # from one column to the next
        y0, y1 = 0, height
    else:
        y0, y1 = int((starts % height).min()), int((last % height).max()) + 1
    box = (int(starts.min()) // height, y0, int(last.max()) // height + 1, y1)
    return float((last - starts + 1).sum()), box
