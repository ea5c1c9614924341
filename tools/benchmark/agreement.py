"""What bfloat16 changes in the detections of a trained model."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig

from benchmark.stages import boxes_lost
from mask_rcnn_plugin.inference.optimize import optimize_for_inference
from mask_rcnn_plugin.training import SafeCheckpointer, setup_datasets


class Agreement(NamedTuple):
    """
    Attributes:
        images, boxes: number of images, and of float32's detections on them.
        found: share of those that bfloat16 finds too, of the same class and at IoU > 0.95.
    """

    images: int
    boxes: int
    found: float


def bf16_agreement(folder: Path, device: str, num_images: int = 100) -> Agreement:
    """Detect with a trained model in float32 and in bfloat16, on images of its test set.

    Args:
        folder: a training's output, with config.yaml and model_final.pth.
        device: "cpu" or "cuda".
        num_images: at most so many.
    """
    cfg: DictConfig = LazyConfig.load(str(folder / "config.yaml"))
    cfg.train.device = device
    setup_datasets(cfg, training=False)
    model = instantiate(cfg.model).to(cfg.train.device).eval()
    SafeCheckpointer(model).load_strictly(str(folder / "model_final.pth"))
    exact = optimize_for_inference(model)
    half = optimize_for_inference(model, dtype=torch.bfloat16)
    images = boxes = 0
    lost = 0.0
    for batch in islice(instantiate(cfg.dataloader.test), num_images):
        with torch.no_grad():
            outputs = zip(exact(batch), half(batch))
        for theirs, ours in outputs:
            count = len(theirs["instances"])
            images, boxes = images + 1, boxes + count
            lost += count * boxes_lost(ours["instances"], theirs["instances"])
    return Agreement(images, boxes, 1 - lost / max(boxes, 1))
