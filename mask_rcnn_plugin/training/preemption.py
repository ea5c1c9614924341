"""Ending a training early, at the request of a cluster, so that it can be resumed."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from mask_rcnn_plugin.training.checkpoint import CheckpointHook

EXIT_CODE = 75
"""Of a training that SIGTERM or SIGUSR1 has ended; EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

logger = logging.getLogger(__name__)


class Preemption(HookBase):
    """Saves and exits with `EXIT_CODE` after the step in which any process got a signal.

    It heeds signals as a context manager. The processes agree after each step. An evaluation is
    broken off at once, in all processes: what has been trained was saved before it.

    Args:
        saving: the training's hook, registered before this one.

    Raises:
        SaveError: instead of the exit, if the last checkpoint could not be written: a job that is
            restarted after each such exit would make no progress.
    """

    def __init__(self, saving: CheckpointHook) -> None:
        self._saving = saving
        self._signal: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "Preemption":
        # Python takes handlers from its main thread only; in another one signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends at once, and that all processes leave together."""
        self._at_once = True
        try:
            if self._signal:
                self._exit("during an evaluation")
            yield
            # The first process computes AP: the others wait for it here, where a signal that ends
            # it ends them too, and over gloo: in a wait of NCCL's no Python would run.
            comm.all_gather(None)
        except (Exception, SystemExit):
            # Of the signal, or as workers and other processes, which got it too, ended first.
            if self._signal:
                self._exit("during an evaluation")
            raise
        finally:
            self._at_once = False

    def after_step(self) -> None:
        alone = comm.get_world_size() == 1
        if self._signal is not None if alone else self.trainer.any_signalled:
            self._saving.save_now()
            self._exit(f"after iteration {self.trainer.iter}")

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # inherited by a process that loads images
            return
        self._signal = signal.Signals(number)
        self.trainer.signalled = True
        if self._at_once:
            self._at_once = False  # another signal does not end what this one brings about
            sys.exit(EXIT_CODE)  # `at_once` logs it: logging may be what is interrupted here

    def _exit(self, when: str) -> None:
        if self._saving.error:
            raise self._saving.error
        by = self._signal.name if self._signal else "a signal to another process"
        logger.warning(f"Ended by {by} {when}, exit code {EXIT_CODE}: --resume continues")
        sys.exit(EXIT_CODE)
