"""The hook that evaluates while training."""

from collections.abc import Callable
from typing import Any

from detectron2.engine import hooks

from mask_rcnn_plugin.training.checkpoint import CheckpointHook
from mask_rcnn_plugin.training.preemption import Preemption
from mask_rcnn_plugin.training.random_states import random_states_kept


class SafeEvalHook(hooks.EvalHook):
    """detectron2's `EvalHook`, made safe.

    A checkpoint is saved before an evaluation begins, a signal ends the evaluation at once, and the
    random states stay as they were. A resume repeats an evaluation that was interrupted. A training
    that fails in its last iteration is not evaluated.

    Args:
        period: in iterations; 0: after the training only.
    """

    def __init__(
        self,
        period: int,
        function: Callable[[], dict[str, Any]],
        saving: CheckpointHook,
        preemption: Preemption,
    ) -> None:
        def evaluate() -> dict[str, Any]:
            if self.trainer.iter < self.trainer.max_iter:  # else the final one is there
                saving.save_now()
            with preemption.at_once(), random_states_kept():
                return function()

        super().__init__(period, evaluate)

    def before_train(self) -> None:
        # The checkpoint gone on from was saved before this evaluation, which an end then prevented.
        trainer = self.trainer
        start = trainer.start_iter
        if 0 < start < trainer.max_iter:
            trainer.iter = trainer.storage.iter = start - 1
            self.after_step()
            trainer.iter = trainer.storage.iter = start

    def after_train(self) -> None:
        # Only a training that has finished counts beyond its last iteration.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
