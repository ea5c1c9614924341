"""Trained models in use."""

from mask_rcnn_plugin.inference.optimize import optimize_for_inference

__all__ = ["optimize_for_inference"]
