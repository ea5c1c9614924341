"""COCO evaluation: predictions packed as they come, scored by the fastest backend there is."""

from mask_rcnn_plugin.evaluation.evaluator import (
    PREDICTIONS_FILE,
    MaskRCNNCOCOEvaluator,
    Task,
    coco_results,
    keypoint_oks_sigmas,
    results_table,
    write_results,
    write_submissions,
)

__all__ = [
    "PREDICTIONS_FILE",
    "MaskRCNNCOCOEvaluator",
    "Task",
    "coco_results",
    "keypoint_oks_sigmas",
    "results_table",
    "write_results",
    "write_submissions",
]
