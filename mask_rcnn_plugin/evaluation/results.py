"""The numbers of an evaluation: results.json, and as a table."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mask_rcnn_plugin.config.check import METRICS
from mask_rcnn_plugin.evaluation.evaluator import COCO_LIMIT, MaskRCNNCOCOEvaluator

Results = Mapping[str, Mapping[str, float]]  # {task: {metric: AP in points}}


def write_results(
    path: Path,
    results: Results,
    evaluator: MaskRCNNCOCOEvaluator,
    ms_per_image: float | None = None,
) -> None:
    """Write results.json: {"dataset", "bbox": {"AP": ...}, "segm", "keypoints", "evaluator", ...}.

    AP is in points (0 to 100); a metric without anything to score is null. `ms_per_image` is the
    time of the model's call, post-processing included; null where no model ran. `max_detections`,
    how many detections of an image and category count, is there where it is not COCO's 100.
    """
    dataset = evaluator.dataset_name
    content: dict[str, Any] = {"dataset": dataset}
    for task, metrics in results.items():
        content[task] = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    content["evaluator"] = evaluator.backend if results else f"none: {dataset} has no annotations"
    if evaluator.max_detections != COCO_LIMIT:
        content["max_detections"] = evaluator.max_detections
    content["ms_per_image"] = None if ms_per_image is None else round(ms_per_image, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def results_table(results: Results, paper: Results | None = None) -> str:
    """AP of each task as a Markdown table, with the paper's below where it gives one.

    Metrics of single categories are left out.
    """
    columns = METRICS["segm"]  # keypoints lack one of them
    rows = []
    for task, metrics in results.items():
        for name, values in ((task, metrics), (f"{task} (paper)", (paper or {}).get(task, {}))):
            if values:
                rows.append([name, *(f"{values[c]:.1f}" if c in values else "" for c in columns)])
    return tabulate(rows, headers=["task", *columns], tablefmt="pipe", disable_numparse=True)
