"""Evaluation of a config's model on its test set."""

from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator, write_results


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Run the model over the test set and compute COCO's metrics.

    Writes `results.json` and the predictions, `coco_instances_results.json`, in
    `train.output_dir`.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.
        model: as `cfg.model` describes it; may be wrapped for distributed training.

    Returns:
        {task: {metric: AP in points}} on the main process, {} on the others and for a test set
        without annotations.
    """
    evaluator: MaskRCNNCOCOEvaluator = instantiate(cfg.dataloader.evaluator)
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, evaluator) or {}
    if comm.is_main_process() and results:
        path = Path(cfg.train.output_dir) / "results.json"
        write_results(path, cfg.dataset.test.names[0], results, evaluator.backend)
    return results
