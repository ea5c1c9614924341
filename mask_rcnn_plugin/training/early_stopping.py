"""Ending a training that does not get better."""

import logging
import math
from typing import Any

from detectron2.engine import HookBase

from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.training.checkpoint import CheckpointHook, score_of

logger = logging.getLogger(__name__)


class StoppedEarly(BaseException):
    """Not an Exception, which detectron2's loop logs as an error."""


class EarlyStopping(HookBase):
    """Ends a training with a final checkpoint once its evaluations no longer improve.

    All processes end together, after the same step, by `StoppedEarly`. A checkpoint holds the
    scores so far; a resume judges them by its own `patience` and `min_delta`. Register it last.

    Args:
        saving: the training's hook.
        metric: TASK/NAME of the evaluation's results, e.g. "segm/AP"; more is better. None: nothing
            ends.
        patience: evaluations in a row without an improvement, after which the training ends.
        min_delta: how many points more than the best so far are an improvement.
    """

    def __init__(
        self,
        saving: CheckpointHook,
        *,
        metric: str | None = None,
        patience: int = 1,
        min_delta: float = 0.0,
    ) -> None:
        self.metric = metric
        self._saving, self._patience, self._min_delta = saving, patience, min_delta
        self._scores: dict[int, float] = {}  # by iteration: an evaluation made twice counts once
        self._loaded_at = 0

    def update(self, results: dict[str, Any]) -> None:
        """Take up an evaluation of the model as it is now; every process calls this.

        Args:
            results: {} on others than the main process.
        """
        score = on_main_process(lambda: score_of(results, self.metric))
        self._count_in_own_iterations()
        if score is not None:
            self._scores[self.trainer.iter] = score

    def before_train(self) -> None:
        self._count_in_own_iterations()
        if 0 < self.trainer.start_iter < self.trainer.max_iter:
            self._end_if_enough(self.trainer.start_iter - 1)

    def _count_in_own_iterations(self) -> None:
        """After a resume with another batch, in whose iterations the trainer counts."""
        if self._loaded_at:
            scale, scores = self.trainer.start_iter / self._loaded_at, self._scores.items()
            self._scores = {round((i + 1) * scale) - 1: score for i, score in scores}
        self._loaded_at = 0

    def after_step(self) -> None:
        self._end_if_enough(self.trainer.iter)

    def _end_if_enough(self, iteration: int) -> None:
        best, best_iteration, waited = -math.inf, 0, 0
        for evaluated, score in self._scores.items():
            waited += 1
            if score > best + self._min_delta:  # NaN is none
                best, best_iteration, waited = score, evaluated, 0
        if waited < self._patience:
            return
        logger.info(
            "Stopped early after iteration %d: %s has not risen by more than %g in the last %d "
            "evaluations (train.early_stopping). The best was %.3f after iteration %d",
            *(iteration, self.metric, self._min_delta, waited, best, best_iteration),
        )
        self.trainer.iter = iteration
        self._saving.save_final()
        raise StoppedEarly

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "scores": self._scores} if self._scores else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] == self.metric:
            self._scores = dict(state["scores"])
            self._loaded_at = self.trainer.iter + 1
