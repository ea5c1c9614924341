"""Weights that a user names: where they are, what is in the file, and how it fits a model."""

from mask_rcnn_plugin.weights.files import WeightsError, download, resolve_weights
from mask_rcnn_plugin.weights.loader import WeightsLoader

__all__ = ["WeightsError", "WeightsLoader", "download", "resolve_weights"]
