"""The hook that keeps the best model of a training."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from mask_rcnn_plugin.training.checkpoint import (
    BEST,
    Checkpointer,
    SaveError,
    WeightsError,
    check_readable,
    write_checkpoint,
)

logger = logging.getLogger(__name__)


class BestCheckpointer(HookBase):
    """Keeps the model with the highest value of a metric in model_best.pth.

    The file has "model", "metric", "score" and "iteration". It is for use, not to go on from:
    `last_checkpoint` never names it. A resumed training knows the score from its checkpoint and
    from the file, whichever is higher.

    Args:
        checkpointer: of the training.
        metric: TASK/NAME of the evaluation's results, e.g. "segm/AP"; more is better.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str) -> None:
        self._checkpointer = checkpointer
        self._path = Path(checkpointer.save_dir) / f"{BEST}.pth"
        self._metric = metric
        self._score = -math.inf

    def before_train(self) -> None:
        # The last evaluation may have been after the checkpoint that is gone on from.
        if self.trainer.start_iter == 0 or not comm.is_main_process() or not self._path.exists():
            return
        try:
            check_readable(self._path)
        except WeightsError as error:
            logger.warning("The best model is not known: %s", error)
            return
        best = torch.load(self._path, map_location="cpu", weights_only=True)
        if best.get("metric") == self._metric:
            self._score = max(self._score, best["score"])

    def update(self, results: dict[str, Any]) -> None:
        """Save the model if it is the best so far. An unknown metric is logged as an error.

        Args:
            results: of an evaluation of the model as it is now, {} on others than the main process.
        """
        if not results:
            return
        flat = flatten_results_dict(results)
        if self._metric not in flat:
            logger.error(
                "train.best_metric is %r, not one of %s: no best model is kept",
                self._metric,
                sorted(flat),
            )
            return
        score = float(flat[self._metric])
        if not score > self._score:  # NaN included
            return
        content = {
            "model": self._checkpointer.model.state_dict(),
            "metric": self._metric,
            "score": score,
            "iteration": min(self.trainer.iter, self.trainer.max_iter - 1),
        }
        try:
            write_checkpoint(self._path, content)
        except SaveError as error:
            logger.error("%s", error)
            return
        logger.info("%s: best model so far, %s %.3f", self._path, self._metric, score)
        self._score = score

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self._metric, "score": self._score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] == self._metric:
            self._score = state["score"]
