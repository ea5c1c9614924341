"""What bfloat16 changes in the detections of a trained model."""

from itertools import islice
from pathlib import Path

import torch
from detectron2.config import instantiate

from benchmark.stages import boxes_lost
from mask_rcnn_plugin import get_config, load, optimize_for_inference
from mask_rcnn_plugin.training import setup_datasets


@torch.no_grad()
def bf16_agreement(folder: Path, device: str, num_images: int = 100) -> dict[str, float]:
    """Detect in float32 and in bfloat16 with the model of a training's output, on its test set.

    Returns:
        Number of "images", and of float32's "boxes" on them; "found", the share of those that
        bfloat16 finds too, of the same class and at IoU > 0.95.
    """
    cfg = get_config(str(folder / "config.yaml"))
    setup_datasets(cfg, training=False)
    model = load(folder / "model_final.pth", device=device, optimize=False).model
    exact = optimize_for_inference(model)
    half = optimize_for_inference(model, dtype=torch.bfloat16)
    images = boxes = 0
    lost = 0.0
    for batch in islice(instantiate(cfg.dataloader.test), num_images):
        for theirs, ours in zip(exact(batch), half(batch)):
            count = len(theirs["instances"])
            images, boxes = images + 1, boxes + count
            lost += count * boxes_lost(ours["instances"], theirs["instances"])
    return {"images": images, "boxes": boxes, "found": 1 - lost / max(boxes, 1)}
