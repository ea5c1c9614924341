"""Annotations in which there is nothing to find, told many at a time.

Nearly all of a dataset are polygons that agree with their box and area, which NumPy sees for
thousands in the time that `annotations.inspect` takes for hundreds. What is not clear here is
inspected.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from mask_rcnn_plugin.data.check.annotations import Context

_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Bools = npt.NDArray[np.bool_]
_NO_POLYGON = [0.0] * 6


class Plain(msgspec.Struct):
    """What an annotation must be in JSON; other keys count for nothing."""

    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    area: float
    segmentation: list[list[float]] = []
    keypoints: list[float] = []
    num_keypoints: int | msgspec.UnsetType = msgspec.UNSET
    iscrowd: Literal[0] = 0
    ignore: Literal[0] = 0


decode = msgspec.json.Decoder(Plain).decode


def nothing_to_find(annotations: Sequence[Plain], context: Context) -> _Bools:
    """For each, True only if `inspect` would find nothing in it."""
    sizes = [context.images.get(a.image_id, (0, 0)) for a in annotations]
    width, height = np.array(sizes, float).reshape(-1, 2).T
    x0, y0, w, h = np.array([a.bbox for a in annotations], float).reshape(-1, 4).T
    box = np.stack([x0, y0, x0 + w, y0 + h])
    sound = (width > 0) & (w >= 1) & (h >= 1) & _inside(box, width, height)
    sound &= np.array([_category_fits(a, context) for a in annotations], bool)
    sound &= _masks_agree(annotations, box, width, height, context.needs_mask)
    return sound & _keypoints_fit(annotations, width, height, context.num_keypoints)


def _inside(box: npt.NDArray[np.float64], width: npt.NDArray, height: npt.NDArray) -> _Bools:
    """Whether boxes x0, y0, x1, y1 lie in the image, but for a pixel, and not beside it."""
    x0, y0, x1, y1 = box
    within = (x0 >= -1) & (y0 >= -1) & (x1 <= width + 1) & (y1 <= height + 1)
    return within & (x0 < width) & (y0 < height) & (x1 > 0) & (y1 > 0)


def _category_fits(annotation: Plain, context: Context) -> bool:
    """Whether it is one of the dataset's, with keypoints where the annotation has them."""
    has_keypoints = context.categories.get(annotation.category_id)
    if has_keypoints is None:
        return annotation.category_id in context.categories and not annotation.keypoints
    return bool(annotation.keypoints) or not has_keypoints


def _masks_agree(
    annotations: Sequence[Plain],
    box: npt.NDArray[np.float64],
    width: npt.NDArray[np.float64],
    height: npt.NDArray[np.float64],
    needed: bool,
) -> _Bools:
    """Whether all polygons are sound, and their box and area those of the annotation."""
    counts = np.array([len(a.segmentation) for a in annotations], int)
    agree = np.full(len(annotations), not needed)
    if not counts.any():
        return agree
    polygons = list(chain.from_iterable(a.segmentation for a in annotations))
    usable = np.array([len(p) >= 6 and len(p) % 2 == 0 for p in polygons])
    polygons = [p if good else _NO_POLYGON for p, good in zip(polygons, usable)]
    ends = np.cumsum([len(p) // 2 for p in polygons])
    starts = np.concatenate([[0], ends[:-1]])
    points = np.fromiter(chain.from_iterable(polygons), float, 2 * ends[-1]).reshape(-1, 2)
    xs, ys = np.ascontiguousarray(points.T)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    areas = np.abs(np.add.reduceat(xs * ys[following] - ys * xs[following], starts)) / 2
    low = [np.minimum.reduceat(x, starts) for x in (xs, ys)]
    high = [np.maximum.reduceat(x, starts) for x in (xs, ys)]
    owner = np.repeat(np.arange(len(annotations)), counts)
    usable &= _inside(np.stack(low + high), width[owner], height[owner])

    has = np.flatnonzero(counts)  # from here on one value for each of these
    first = np.cumsum(counts)[has] - counts[has]
    area = np.add.reduceat(areas, first)
    edges = [np.minimum.reduceat(x, first) for x in low]
    edges += [np.maximum.reduceat(x, first) for x in high]
    limits = np.stack([width, height, width, height])[:, has]
    mask, stated = (np.clip(b, 0, limits) for b in (np.stack(edges), box[:, has]))
    off = np.abs(mask - stated)
    near = np.maximum(off[:2], off[2:]) <= 2 + 0.05 * (mask[2:] - mask[:2])
    # Nearer than `inspect` asks for, which computes areas in other ways.
    alike = np.abs(np.array([a.area for a in annotations])[has] - area) <= 5 + 0.05 * area
    agree[has] = np.logical_and.reduceat(usable, first) & near.all(0) & alike & (area > 0)
    return agree


def _keypoints_fit(
    annotations: Sequence[Plain],
    width: npt.NDArray[np.float64],
    height: npt.NDArray[np.float64],
    number: int | None,
) -> _Bools:
    """Whether there are none, or all that there should be, in the image, and counted right."""
    fit = np.array([not a.keypoints for a in annotations], bool)
    has = [i for i, a in enumerate(annotations) if len(a.keypoints) == 3 * (number or 0) > 0]
    if has:
        keypoints = [annotations[i].keypoints for i in has]
        x, y, v = np.moveaxis(np.array(keypoints, float).reshape(len(has), -1, 3), 2, 0)
        inside = (x >= -1) & (y >= -1) & (x <= width[has, None]) & (y <= height[has, None])
        labelled = (v > 0).sum(1).tolist()
        counted = [
            annotations[i].num_keypoints in (n, msgspec.UNSET) for i, n in zip(has, labelled)
        ]
        fit[has] = np.isin(v, (0, 1, 2)).all(1) & (inside | (v == 0)).all(1) & counted
    return fit
