"""What is wrong or doubtful in one annotation, and what of it can be repaired."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.data.annotation_rules import (
    Fault,
    annotation_faults,
    are_finite,
    are_numbers,
    is_integer,
    shown,
)

Annotation = dict[str, Any]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in image pixels

_MAX_RASTER = 2**28  # pixels: polygons of a larger image are measured without rasterizing them
UNFIT_KEYPOINTS = {"keypoint-format", "keypoint-count", "keypoint-other"}
_BOX_FAULTS = {"box-missing", "box-format", "box-negative", "box-empty", "box-outside"}
_AREA_FAULTS = {"area-format", "area-missing"}
NOT_TRAINED = {"crowd", "box-empty", "mask-empty"}  # left out, though no error
# What `repair` may mend; with any other error the annotation is dropped.
REPAIRABLE = {*_BOX_FAULTS, "box-xyxy", *_AREA_FAULTS, *UNFIT_KEYPOINTS}


@dataclass
class Context:
    """What an annotation is checked against.

    Attributes:
        images: width and height by id.
        categories: whether a category has keypoints, by id; None: others than the dataset's.
        num_keypoints: of the categories that have any; None if none has.
        needs_mask: whether every annotation must have a segmentation.
        xyxy: whether boxes that the mask says to be x1, y1, x2, y2 are meant so.
    """

    images: dict[int, tuple[int, int]]
    categories: dict[int, bool | None]
    num_keypoints: int | None = None
    needs_mask: bool = False
    xyxy: bool = True


def inspect(annotation: Any, context: Context) -> list[Fault]:
    """Everything found in one annotation by itself: (kind, text) each."""
    if not isinstance(annotation, dict):
        return [("annotation-format", f"annotation is {shown(annotation)}")]
    missing_id = [("annotation-id-missing", "")] if annotation.get("id") is None else []
    for key in ("image_id", "category_id", *([] if missing_id else ["id"])):
        if not is_integer(annotation.get(key)):
            return [("annotation-format", f"{key} is {shown(annotation.get(key))}")]
    size = context.images.get(annotation["image_id"])
    if size is None:
        return [("unknown-image", f"image_id {annotation['image_id']}")]
    usable = _without_unusable_polygons(annotation)
    faults = annotation_faults(usable, *size, context.num_keypoints, needs_mask=context.needs_mask)
    has_keypoints = context.categories.get(annotation["category_id"], False)
    if usable.get("keypoints") and has_keypoints is None:
        faults.append(("keypoint-other", ""))
    kinds = {kind for kind, _ in faults}
    found = [*missing_id, *_flag_faults(annotation, context), *faults]
    if usable is not annotation:
        found.append(("polygon-dropped", ""))
    found += _mask_box_area_doubts(usable, size, kinds, context.xyxy)
    if not usable.get("keypoints"):
        if has_keypoints and not annotation.get("iscrowd"):
            found.append(("keypoint-missing", ""))
    elif not kinds & UNFIT_KEYPOINTS:
        found += _keypoint_doubts(usable, size)
    return found


def repair(annotation: Annotation, found: set[str], size: tuple[int, int]) -> Annotation:
    """A copy in which everything that follows from the rest is right.

    A broken or missing box or area is computed from the mask, unusable polygons beside usable ones
    and unfit keypoints are dropped, num_keypoints is counted.

    Args:
        annotation: without errors other than those of `REPAIRABLE`.
        found: the kinds that `inspect` found in it.
        size: width and height of its image.
    """
    mended = dict(_without_unusable_polygons(annotation))
    if "box-xyxy" in found:
        x0, y0, x1, y1 = annotation["bbox"]
        mended["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    mask = measure(mended.get("segmentation"), size, exactly=True)
    if mask is not None and mask[0] > 0:
        x0, y0, x1, y1 = _clipped(mask[1], size)
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
    """Area and box of polygons or an RLE without faults, in pixels; None without a mask.

    The box is that of all points of the polygons, which may lie outside the image.

    Args:
        size: width and height of the image.
        exactly: rasterize polygons, as overlapping ones need, rather than add up their areas.
    """
    width, height = size
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, height, width)
        x, y, w, h = coco_mask.toBbox(rle).tolist()
        return float(coco_mask.area(rle)), (x, y, x + w, y + h)
    points = list(chain(*segmentation))
    xs, ys = points[0::2], points[1::2]
    box = min(xs), min(ys), max(xs), max(ys)
    if exactly and width * height <= _MAX_RASTER:
        polygons = [np.asarray(p, np.float64) for p in segmentation]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return float(coco_mask.area(rle)), box
    rings = (np.array(p, np.float32).reshape(-1, 2) for p in segmentation)
    return sum(map(cv2.contourArea, rings)), box


def _clipped(box: Sequence[float], size: tuple[int, int]) -> Box:
    x0, y0, x1, y1 = box
    return max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])


def _flag_faults(annotation: Annotation, context: Context) -> Iterator[Fault]:
    if annotation["category_id"] not in context.categories:
        yield "unknown-category", f"category_id {annotation['category_id']}"
    if annotation.get("ignore", 0) != 0:
        yield "ignore-set", f"ignore is {shown(annotation['ignore'])}"
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1, None):
        yield "iscrowd-format", f"iscrowd is {shown(crowd)}"
    elif crowd:
        yield "crowd", ""


def _mask_box_area_doubts(
    annotation: Annotation, size: tuple[int, int], faults: set[str], xyxy: bool
) -> Iterator[Fault]:
    """How mask, box and area disagree with the image and each other, where they have no faults."""
    width, height = size
    segmentation, mask = annotation.get("segmentation"), None
    if not any(kind.startswith(("mask-", "polygon-", "rle-", "non-")) for kind in faults):
        mask = measure(segmentation, size)
        if annotation.get("iscrowd") and isinstance(segmentation, list) and segmentation:
            yield "crowd-polygon", f"{len(segmentation)} polygons"
        if mask is not None:
            x0, y0, x1, y1 = mask[1]  # of an RLE always inside
            if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
                yield "mask-partly-outside", ""
    if not any(kind.startswith(("box-", "non-")) for kind in faults):
        box = x, y, w, h = annotation["bbox"]
        corners = x < w <= width and y < h <= height
        of_mask = _clipped(mask[1], size) if mask is not None and mask[0] > 0 else None
        agrees = of_mask is None or _agree((x, y, x + w, y + h), of_mask, size)
        if xyxy and corners and of_mask and not agrees and _agree(box, of_mask, size):
            yield "box-xyxy", f"bbox {shown(box)}, mask over {shown(list(of_mask))}"
            agrees = True
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            doubt = "; is it x1, y1, x2, y2?" if corners else ""
            yield "box-partly-outside", f"bbox {shown(box)} in {width} x {height}{doubt}"
        if w < 1 or h < 1:
            yield "box-small", f"bbox {shown(box)}"
        if of_mask and not agrees:
            x0, y0, x1, y1 = of_mask
            as_box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            yield "box-contradicts", f"bbox {shown(box)}, mask over {as_box}"
    area = annotation.get("area")
    if area is None:
        yield "area-missing", ""
    elif not are_numbers([area]) or not are_finite([area]):
        yield "area-format", f"area is {shown(area)}"
    elif mask is not None and _differs(area, mask[0]):
        exact = measure(segmentation, size, exactly=True)  # overlapping polygons count once
        if exact is not None and _differs(area, exact[0]):
            yield "area-contradicts", f"area {shown(area)}, mask {exact[0]:.0f}"


def _agree(box: Sequence[float], of_mask: Box, size: tuple[int, int]) -> bool:
    """Whether the edges of two boxes x1, y1, x2, y2 inside an image lie near each other."""
    (a0, b0, a1, b1), (x0, y0, x1, y1) = _clipped(box, size), of_mask
    across, along = max(abs(a0 - x0), abs(a1 - x1)), max(abs(b0 - y0), abs(b1 - y1))
    return across <= 2 + 0.05 * (x1 - x0) and along <= 2 + 0.05 * (y1 - y0)


def _differs(area: float, of_mask: float) -> bool:
    return abs(area - of_mask) > 10 + 0.1 * of_mask


def _keypoint_doubts(annotation: Annotation, size: tuple[int, int]) -> Iterator[Fault]:
    width, height = size
    keypoints = annotation["keypoints"]
    xs, ys, visibility = keypoints[0::3], keypoints[1::3], keypoints[2::3]
    if not set(visibility) <= {0, 1, 2}:
        yield "keypoint-visibility", f"v is {shown(visibility)}"
    labelled = [(x, y) for x, y, v in zip(xs, ys, visibility) if v > 0]
    if not all(-1 <= x <= width and -1 <= y <= height for x, y in labelled):
        yield "keypoint-outside", ""
    stated = annotation.get("num_keypoints", len(labelled))  # the evaluation counts them then
    if stated != len(labelled):
        yield "num-keypoints", f"num_keypoints {shown(stated)}, labelled {len(labelled)}"


def in_coco_form(annotation: Any) -> Any:
    """The annotation with a segmentation of one meaning written as COCO does, other ones as is."""
    if not isinstance(annotation, dict) or "segmentation" not in annotation:
        return annotation
    return {**annotation, "segmentation": _mask_in_coco_form(annotation["segmentation"])}


def _mask_in_coco_form(mask: Any) -> Any:
    if isinstance(mask, dict):
        return {
            k: [int(n) if is_integer(n) else n for n in v] if isinstance(v, list) else v
            for k, v in mask.items()
        }
    if not isinstance(mask, list) or not mask:
        return mask
    if are_numbers(mask):
        return [mask]
    if _are_points(mask) and len(mask) > 2:
        return [list(chain(*mask))]
    return [list(chain(*p)) if _are_points(p) else p for p in mask]


def _are_points(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, list) and len(v) == 2 and are_numbers(v) for v in values
    )


def _without_unusable_polygons(annotation: Annotation) -> Annotation:
    """Without the polygons that detectron2's loader drops, if it keeps another one."""
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or not all(isinstance(p, list) for p in polygons):
        return annotation
    usable = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    if not usable or len(usable) == len(polygons):
        return annotation
    return {**annotation, "segmentation": usable}
