"""Finds annotations that are clearly sound, many at a time.

Nearly all of a dataset are polygons that agree with their box and area, which NumPy verifies for
thousands in the time that `annotations.inspect` takes for hundreds. What is not clear here is
inspected.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from mask_rcnn_plugin.data.annotation_file import Annotation
from mask_rcnn_plugin.data.check.annotations import Context

_Bools = npt.NDArray[np.bool_]
_Floats = npt.NDArray[np.float64]
_NO_POLYGON = [0.0] * 6


def nothing_to_find(annotations: Sequence[Annotation], context: Context) -> _Bools:
    """For each, True only if `inspect` would find nothing in it."""
    width, height = _rows((context.images.get(a.image_id, (0, 0)) for a in annotations), 2).T
    x0, y0, w, h = _rows((a.bbox for a in annotations), 4).T
    box = np.stack([x0, y0, x0 + w, y0 + h])
    sound = (width > 0) & (w >= 1) & (h >= 1) & _inside(box, width, height)
    # Those with keypoints where the annotation has them.
    with_keypoints = {key for key, has in context.categories.items() if has is not None}
    without = {key for key, has in context.categories.items() if not has}
    sound &= _bools(
        a.category_id in (with_keypoints if a.keypoints else without) for a in annotations
    )
    sound &= _bools(not (a.iscrowd or isinstance(a.segmentation, dict)) for a in annotations)
    sound &= _masks_agree(annotations, box, width, height, context.needs_mask)
    return sound & _keypoints_fit(annotations, width, height, context.num_keypoints)


def _rows(values: Iterable[Iterable[float]], length: int) -> _Floats:
    return np.fromiter(chain.from_iterable(values), float).reshape(-1, length)


def _bools(values: Iterable[bool]) -> _Bools:
    return np.fromiter(values, bool)


def _inside(box: _Floats, width: _Floats, height: _Floats) -> _Bools:
    """Whether boxes x0, y0, x1, y1 lie in the image, but for a pixel, and not beside it."""
    x0, y0, x1, y1 = box
    within = (x0 >= -1) & (y0 >= -1) & (x1 <= width + 1) & (y1 <= height + 1)
    return within & (x0 < width) & (y0 < height) & (x1 > 0) & (y1 > 0)


def _masks_agree(
    annotations: Sequence[Annotation], box: _Floats, width: _Floats, height: _Floats, needed: bool
) -> _Bools:
    """Whether all polygons are sound, and their box and area those of the annotation."""
    masks = [a.segmentation if isinstance(a.segmentation, list) else [] for a in annotations]
    counts = np.fromiter(map(len, masks), int)
    agree = np.full(len(annotations), not needed)
    if not counts.any():
        return agree
    polygons = list(chain.from_iterable(masks))
    lengths = np.fromiter(map(len, polygons), int)
    usable = (lengths >= 6) & (lengths % 2 == 0)
    for index in np.flatnonzero(~usable):
        polygons[index], lengths[index] = _NO_POLYGON, 6
    ends = np.cumsum(lengths // 2)
    starts = ends - lengths // 2
    points = np.fromiter(chain.from_iterable(polygons), float, lengths.sum())
    xs, ys = points[::2].copy(), points[1::2].copy()
    cross = np.append(xs[:-1] * ys[1:] - ys[:-1] * xs[1:], 0)
    last = ends - 1
    cross[last] = xs[last] * ys[starts] - ys[last] * xs[starts]
    areas = np.abs(np.add.reduceat(cross, starts)) / 2
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
    stated_area = np.fromiter((a.area for a in annotations), float)[has]
    alike = np.abs(stated_area - area) <= 5 + 0.05 * area
    agree[has] = np.logical_and.reduceat(usable, first) & near.all(0) & alike & (area > 0)
    return agree


def _keypoints_fit(
    annotations: Sequence[Annotation], width: _Floats, height: _Floats, number: int | None
) -> _Bools:
    """Whether there are none, or all that there should be, in the image, and counted right."""
    lengths = np.fromiter((len(a.keypoints or ()) for a in annotations), int)
    fit, has = lengths == 0, np.flatnonzero((lengths == 3 * (number or 0)) & (lengths > 0))
    if len(has):
        keypoints = _rows((annotations[i].keypoints or () for i in has.tolist()), lengths[has[0]])
        x, y, v = np.moveaxis(keypoints.reshape(len(has), -1, 3), 2, 0)
        inside = (x >= -1) & (y >= -1) & (x <= width[has, None]) & (y <= height[has, None])
        labelled = (v > 0).sum(1).tolist()
        counted = [
            annotations[i].num_keypoints in (n, UNSET) for i, n in zip(has.tolist(), labelled)
        ]
        fit[has] = np.isin(v, (0, 1, 2)).all(1) & (inside | (v == 0)).all(1) & counted
    return fit
