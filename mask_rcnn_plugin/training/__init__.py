"""Training and evaluation of a config, on detectron2's trainer, loader and evaluator."""

from mask_rcnn_plugin.training.checkpoint import Checkpointer, resolve_weights
from mask_rcnn_plugin.training.setup import setup_datasets
from mask_rcnn_plugin.training.trainer import train

__all__ = [
    "Checkpointer",
    "resolve_weights",
    "setup_datasets",
    "train",
]
