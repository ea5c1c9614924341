"""Training of a config, on detectron2's trainer and hooks; train.py puts it together."""

from mask_rcnn_plugin.training.checkpoint import SafeCheckpointer
from mask_rcnn_plugin.training.setup import setup_datasets
from mask_rcnn_plugin.weights import resolve_weights

__all__ = ["SafeCheckpointer", "resolve_weights", "setup_datasets"]
