"""How time grows with the number of detections, of classes and of pixels, detectron2's and ours."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from benchmark.stages import (
    CLASSES,
    MANY_CLASSES,
    Peers,
    Runs,
    ground_truth,
    mask_heads,
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
    """Masks by the number of detections, the mask branch by classes, the whole model by pixels.

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
    for classes in (1, 10, CLASSES, MANY_CLASSES):
        yield Growth("mask branch, training", "classes", classes, _training_runs(device, classes))
    for size in ((400, 544), (800, 1088), (1600, 2176)):
        p = build(device, size=size)
        runs = {"detectron2": _call(p.stock, p.batch), "plugin": _call(p.plugin, p.batch)}
        yield Growth("whole model", "pixels", size[0] * size[1], runs)


def _training_runs(device: str, num_classes: int) -> Runs:
    """Loss and gradients of the mask head alone, for the 128 positive RoIs of an image."""
    which = torch.arange(128) % 8
    instances = ground_truth((512, 512), 8, seed=0)[which]
    instances.proposal_boxes = instances.gt_boxes
    instances.gt_classes = which % num_classes
    instances = instances.to(device)
    theirs, ours = mask_heads(num_classes)
    runs: Runs = {}
    for name, head in (("detectron2", theirs), ("plugin", ours)):
        features = torch.randn(128, 256, 14, 14, device=device)
        if name == "plugin":
            features = features.to(memory_format=torch.channels_last)
            head = head.to(memory_format=torch.channels_last)
        runs[name] = partial(_gradients, head.to(device).train(), features, [instances])
    return runs


def _gradients(head: nn.Module, features: Tensor, instances: list[Instances]) -> None:
    with torch.enable_grad(), EventStorage():
        head(features, instances)["loss_mask"].backward()
    head.zero_grad()


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (first(), second())


def _call(model: Any, batch: Any) -> Callable[[], Any]:
    return lambda: model(batch)
