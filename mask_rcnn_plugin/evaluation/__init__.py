"""COCO evaluation: predictions packed as they come, scored by the fastest backend there is."""

from mask_rcnn_plugin.evaluation.evaluator import (
    MaskRCNNCOCOEvaluator,
    ScoringError,
    Task,
    keypoint_oks_sigmas,
)
from mask_rcnn_plugin.evaluation.predictions import PREDICTIONS_FILE, coco_results
from mask_rcnn_plugin.evaluation.results import results_table

__all__ = [
    "PREDICTIONS_FILE",
    "MaskRCNNCOCOEvaluator",
    "ScoringError",
    "Task",
    "coco_results",
    "keypoint_oks_sigmas",
    "results_table",
]
