"""The hook that saves checkpoints while training."""

import logging
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

from mask_rcnn_plugin.training.checkpoint import (
    FINAL,
    Checkpointer,
    SaveError,
    periodic_checkpoints,
)

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(HookBase):
    """Saves model_ITERATION.pth every `period` iterations and model_final.pth after the last one.

    In place of detectron2's, which forgets at a resume what it has to delete, and to which a full
    disk is the end of the training. All processes have this hook.

    Args:
        checkpointer: of the training.
        period: in iterations.
        max_to_keep: how many periodic ones stay, whichever run wrote them; None: all. What
            `last_checkpoint` names, the final and the best one are never deleted.

    Attributes:
        error: of the last one, if it could not be written.

    Raises:
        SaveError: from `after_step`, if the final one cannot be written. Any other that cannot be
            is logged as an error, and the training goes on.
    """

    error: SaveError | None = None

    def __init__(
        self, checkpointer: Checkpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        if period < 1 or (max_to_keep is not None and max_to_keep < 1):
            raise ValueError(f"period {period} and max_to_keep {max_to_keep} must be 1 or more")
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if iteration + 1 == self.trainer.max_iter:
            self._checkpointer.save(FINAL, iteration=iteration)
            self.error = None
        elif (iteration + 1) % self._period == 0:
            self.save_now()

    def save_now(self) -> None:
        """Save, unless this iteration is saved already."""
        iteration = self.trainer.iter
        if self._checkpointer.saved_iteration == iteration:
            return
        try:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        except SaveError as error:
            logger.error("%s", error)
            self.error = error
            return
        self.error = None
        if self._max_to_keep is not None and comm.is_main_process():
            last = Path(self._checkpointer.get_checkpoint_file())
            for path in periodic_checkpoints(last.parent)[: -self._max_to_keep]:
                if path != last:
                    path.unlink()
