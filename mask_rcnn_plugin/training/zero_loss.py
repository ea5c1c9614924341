"""A loss that stays 0 trains nothing, which nobody notices before the evaluation."""

import logging
from collections import Counter

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


class ZeroLossWarning(HookBase):
    """Warn of each loss that has been exactly 0 for a number of iterations, once.

    detectron2's heads return 0 where there is nothing to learn from: the keypoint branch where no
    keypoint is visible, the mask branch where no RoI is positive.
    """

    def __init__(self, iterations: int = 200) -> None:
        self._iterations = iterations
        self._zeros: Counter[str] = Counter()

    def after_step(self) -> None:
        for name, (value, iteration) in self.trainer.storage.latest().items():
            if not name.startswith("loss_") or iteration != self.trainer.iter:
                continue
            self._zeros[name] = self._zeros[name] + 1 if value == 0 else 0
            if self._zeros[name] == self._iterations:
                logger.warning(
                    "%s has been 0 for %d iterations: no ground truth for it was seen. Look at the "
                    "annotations with tools/check_dataset.py",
                    name,
                    self._iterations,
                )
