"""Evaluation of a config's model, or of predictions made before, on the config's test set."""

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.evaluation.evaluator import MaskRCNNCOCOEvaluator, ScoringError
from mask_rcnn_plugin.evaluation.predictions import PREDICTIONS_FILE
from mask_rcnn_plugin.evaluation.results import write_results

logger = logging.getLogger(__name__)


def evaluate(
    cfg: DictConfig,
    model: nn.Module,
    config_args: Sequence[str] = (),
    report: Callable[[MaskRCNNCOCOEvaluator], object] | None = None,
) -> dict[str, dict[str, float]]:
    """Run the model over the test set and compute COCO's metrics.

    Writes `results.json` and the predictions, `coco_instances_results.json`, in
    `train.output_dir`; for a test set without annotations, in place of metrics, the files that
    COCO's server takes.

    Args:
        cfg: its datasets set up by `setup_datasets`.
        model: as `cfg.model` describes it; may be wrapped for distributed training.
        config_args: what gives `eval.py` this config; by default the `config.yaml` that a training
            leaves in `train.output_dir`.
        report: called on the main process where there are metrics, when they are written.

    Returns:
        AP in points by task and metric on the main process, {} on the others and for a test set
        without annotations.

    Raises:
        DatasetError: if the test set has no image.
        ScoringError: if AP cannot be computed. The log says how to score the predictions again.
    """
    try:  # first: it says what is wrong with a broken file
        loader = instantiate(cfg.dataloader.test)
    except AssertionError as error:  # detectron2's, of no image
        raise DatasetError(f"test set {list(cfg.dataset.test.names)}: {error}") from error
    evaluator: MaskRCNNCOCOEvaluator = instantiate(cfg.dataloader.evaluator)
    trained = isinstance(model, DistributedDataParallel) or model.training
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if trained and comm.get_world_size() > 1:
        # Running statistics differ between the ranks: the first one's are saved, so they count.
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    output = Path(cfg.train.output_dir)
    try:
        with _timed(model) as seconds:
            results = inference_on_dataset(model, loader, evaluator)
    except ScoringError:
        config = config_args or [str(output / "config.yaml")]
        again = ["--config-file", *config, "--predictions", str(output / PREDICTIONS_FILE)]
        logger.error(
            "To score the predictions again without the model: python eval.py %s", shlex.join(again)
        )
        raise
    if comm.is_main_process():
        write_results(output / "results.json", results, evaluator, 1000 * median(seconds))
        if report and results:
            report(evaluator)
    return results


def evaluator_of(cfg: DictConfig, predictions_file: Path) -> MaskRCNNCOCOEvaluator:
    """An evaluator of the config's test set that has predictions which `evaluate` wrote.

    Raises:
        DatasetError: if the file does not fit the test set.
    """
    DatasetCatalog.get(cfg.dataset.test.names[0])  # says what is wrong with a broken file
    evaluator: MaskRCNNCOCOEvaluator = instantiate(
        {**cfg.dataloader.evaluator, "distributed": False, "output_dir": None}
    )
    evaluator.read(predictions_file)
    return evaluator


@contextmanager
def _timed(model: nn.Module) -> Iterator[list[float]]:
    """Seconds an image of each call of the model inside the block, post-processing included."""
    seconds: list[float] = []

    def now() -> float:
        if torch.cuda.is_initialized():
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
