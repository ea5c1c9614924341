"""How time grows with the number of detections, of classes and of pixels, detectron2's and ours."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mask_rcnn_plugin.benchmark.stages import (
    CLASSES,
    MANY_CLASSES,
    Peers,
    Runs,
    mask_runs,
    masks_to_rle,
)


class Growth(NamedTuple):
    """One line of the table: what is measured, at which number of what, and by whom."""

    name: str
    quantity: str
    number: int
    runs: Runs


def growth(device: str, build: Callable[..., Peers] = Peers) -> Iterator[Growth]:
    """Mask branch and masks to RLE by detections, mask branch by classes, whole model by pixels.

    Args:
        device: "cpu" or "cuda".
        build: makes the peers, from device, size and number of detections.
    """
    for detections in (1, 10, 100, 1000):
        p = build(device, detections=detections)
        branch, (encoding,) = mask_runs(p, CLASSES), masks_to_rle(p)
        runs: Runs = {
            name: _both(branch[name], encoding.runs[name]) for name in ("detectron2", "plugin")
        }
        yield Growth("mask branch and RLE", "detections", len(p.found), runs)
    p = build(device)
    for classes in (1, 10, CLASSES, MANY_CLASSES):
        yield Growth("mask branch", "classes", classes, mask_runs(p, classes))
    for size in ((400, 544), (800, 1088), (1600, 2176)):
        p = build(device, size=size)
        runs = {"detectron2": _call(p.stock, p.batch), "plugin": _call(p.plugin, p.batch)}
        yield Growth("whole model", "pixels", size[0] * size[1], runs)


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (first(), second())


def _call(model: Any, batch: Any) -> Callable[[], Any]:
    return lambda: model(batch)
