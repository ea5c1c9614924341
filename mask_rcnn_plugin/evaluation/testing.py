"""Evaluation of a config's model on its test set."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plugin.evaluation.evaluator import (
    PREDICTIONS_FILE,
    MaskRCNNCOCOEvaluator,
    write_results,
    write_submissions,
)

logger = logging.getLogger(__name__)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Run the model over the test set and compute COCO's metrics.

    Writes `results.json` and the predictions, `coco_instances_results.json`, in
    `train.output_dir`; for a test set without annotations, in place of metrics, the files that
    COCO's server takes (see `write_submissions`).

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.
        model: as `cfg.model` describes it; may be wrapped for distributed training.

    Returns:
        {task: {metric: AP in points}} on the main process, {} on the others and for a test set
        without annotations.
    """
    loader = instantiate(cfg.dataloader.test)  # first: it says what is wrong with a broken file
    evaluator: MaskRCNNCOCOEvaluator = instantiate(cfg.dataloader.evaluator)
    if isinstance(model, DistributedDataParallel):
        # Running statistics differ between the ranks: the first one's are saved, so they count.
        model = model.module
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    with _timed(model) as seconds:
        results = inference_on_dataset(model, loader, evaluator) or {}
    if comm.is_main_process():
        output, dataset = Path(cfg.train.output_dir), cfg.dataset.test.names[0]
        if not results and cfg.dataloader.evaluator.output_dir:
            files = write_submissions(
                output / PREDICTIONS_FILE, dataset, cfg.dataloader.evaluator.tasks
            )
            logger.warning(
                "%s has no annotations, so no score can be computed here; for COCO's evaluation "
                "server there is %s",
                dataset,
                ", ".join(map(str, files)),
            )
        write_results(
            output / "results.json",
            dataset,
            results,
            evaluator.backend if results else f"none: {dataset} has no annotations",
            ms_per_image=1000 * median(seconds),
            max_detections=evaluator.max_detections,
        )
    return results


@contextmanager
def _timed(model: nn.Module) -> Iterator[list[float]]:
    """Seconds an image of each call of the model inside the block, post-processing included."""
    seconds: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    handles = [
        model.register_forward_pre_hook(lambda *_: seconds.append(-now())),
        model.register_forward_hook(
            lambda _, args, output: seconds.append((seconds.pop() + now()) / len(args[0]))
        ),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
