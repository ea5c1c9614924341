"""COCO evaluation: predictions packed as they come, scored by the fastest backend there is."""

from mask_rcnn_plugin.evaluation.evaluator import MaskRCNNCOCOEvaluator
from mask_rcnn_plugin.evaluation.predictions import PREDICTIONS_FILE
from mask_rcnn_plugin.evaluation.results import results_table

__all__ = ["PREDICTIONS_FILE", "MaskRCNNCOCOEvaluator", "results_table"]
