"""The hook that evaluates while training."""

from typing import Any

from detectron2.engine import hooks

from mask_rcnn_plugin.training.periodic_checkpointer import PeriodicCheckpointer


class EvaluationHook(hooks.EvalHook):
    """detectron2's `EvalHook`, which risks nothing.

    What has been trained is saved before an evaluation begins. One that an error or a signal has
    ended is made up for by the resume; a training that ends so in its last iteration is not
    evaluated.

    Args:
        period: in iterations; 0: after the training only.
        function: gives the results.
        saving: the training's hook.
    """

    def __init__(self, period: int, function: Any, saving: PeriodicCheckpointer) -> None:
        super().__init__(period, function)
        self._saving = saving

    def before_train(self) -> None:
        # The checkpoint gone on from was saved before this evaluation, which an end then prevented.
        trainer = self.trainer
        start = trainer.start_iter
        if self._period > 0 and 0 < start < trainer.max_iter and start % self._period == 0:
            trainer.iter = trainer.storage.iter = start - 1
            super()._do_eval()
            trainer.iter = trainer.storage.iter = start

    def _do_eval(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:  # after the last one there is the final one
            self._saving.save_now()
        super()._do_eval()

    def after_train(self) -> None:
        # Only a training that has finished counts beyond its last iteration.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
