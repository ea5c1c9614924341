"""Checkpoints of a training: written whole or not at all, read without running anything."""

import errno
import logging
import math
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from mask_rcnn_plugin.atomic_write import SUFFIX, atomic_write
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.weights.files import WeightsError, unreadable
from mask_rcnn_plugin.weights.loader import WeightsLoader

_FINAL, _BEST, _TAG = "model_final", "model_best", "last_checkpoint"

logger = logging.getLogger(__name__)


class SaveError(UserError):
    """A file that cannot be written, e.g. because the disk is full; the old one is kept."""


class SafeCheckpointer(WeightsLoader):
    """detectron2's checkpointer, for files that may be damaged.

    A file is written whole or not at all, and named in `last_checkpoint` only afterwards. All
    processes call the methods alike: the main process decides what is there.

    Attributes:
        saved_iteration: the last one that was saved or resumed from; -1 before.
    """

    saved_iteration = -1

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As fvcore's, but goes on from the newest checkpoint that can be read: the one that
        `last_checkpoint` names or, should it be damaged, which is logged, that of the latest
        iteration.

        Returns:
            What else is in it, "iteration" for one; {} if there is none.

        Raises:
            WeightsError: as `load_strictly`, for a checkpoint of another model; if there are
                checkpoints and none can be read; if `path` cannot be read, or has next to none of
                the backbone's weights.
        """
        newest = on_main_process(lambda: self._tidy_and_find(resume))
        if newest is None:
            self._load_weights(path)
            return {}
        if not all(comm.all_gather(Path(newest).is_file())):
            raise WeightsError(
                f"{newest} does not exist on all machines: to resume, train.output_dir must be on "
                "a disk that they share"
            )
        self._strict, self._path = True, newest
        rest = self.load(newest)
        self.saved_iteration = rest.get("iteration", -1)
        return rest

    def save(self, name: str, **kwargs: Any) -> None:
        """As fvcore's, but all processes call it, as some of the states are gathered from all.

        Raises:
            SaveError: in all processes, if the main one cannot write the file.
        """
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}

        def write() -> None:
            path = Path(self.save_dir) / f"{name}.pth"
            self.logger.info("Saving checkpoint to %s", path)
            write_checkpoint(path, data | kwargs)
            try:
                with atomic_write(path.with_name(_TAG)) as tag:
                    tag.write(path.name.encode())
            except OSError as error:
                raise SaveError(f"{_TAG} of {path} cannot be written: {error}") from error

        on_main_process(write)
        self.saved_iteration = kwargs.get("iteration", -1)

    def _candidates(self) -> list[Path]:
        """Checkpoints to resume from, the tagged one first, then by iteration from the last one."""
        folder = Path(self.save_dir)
        tag = folder / _TAG  # may be damaged itself
        tagged = [folder / tag.read_text(errors="replace").strip()] if tag.exists() else []
        others = [*periodic_checkpoints(folder), *folder.glob(f"{_FINAL}.pth")]
        others.sort(key=_iteration, reverse=True)
        return tagged + [path for path in others if path not in tagged]

    def _tidy_and_find(self, resume: bool) -> str | None:
        """Remove what a kill has left half written, and find what to resume from."""
        for left_over in Path(self.save_dir).glob(f"*.pth{SUFFIX}"):
            left_over.unlink()
        candidates = self._candidates() if resume else []
        for path in candidates:
            try:
                # Weights alone, as another program's, are nothing to go on from.
                check_readable(path, {"model"} | self.checkpointables.keys() & {"trainer"})
                return str(path)
            except WeightsError as error:
                self.logger.warning("Cannot resume: %s", error)
        if candidates:
            raise WeightsError(
                f"none of the checkpoints in {self.save_dir} can be read: "
                f"{', '.join(path.name for path in candidates)}. Delete them and "
                "last_checkpoint to start over"
            )
        return None


class CheckpointHook(HookBase):
    """Saves model_ITERATION.pth every `period` iterations and model_final.pth after the last one.

    detectron2's `PeriodicCheckpointer` forgets at a resume what it has to delete, and a full disk
    ends the training. All processes have this hook.

    Args:
        period: in iterations.
        max_to_keep: how many periodic ones stay, whichever run wrote them; None: all. What
            `last_checkpoint` names, the final and the best one are never deleted.

    Attributes:
        error: of the last checkpoint, if it could not be written.

    Raises:
        SaveError: from `after_step`, if the final one cannot be written. Any other that cannot be
            is logged as an error, and the training goes on.
    """

    error: SaveError | None = None

    def __init__(
        self, checkpointer: SafeCheckpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if iteration + 1 == self.trainer.max_iter:
            self.save_final()
        elif (iteration + 1) % self._period == 0:
            self.save_now()

    def save_final(self) -> None:
        self._checkpointer.save(_FINAL, iteration=self.trainer.iter)
        self.error = None

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


class BestModelHook(HookBase):
    """Keeps the model with the highest value of a metric in model_best.pth.

    detectron2's `BestCheckpointer` tags the file as the last checkpoint and forgets the score at a
    resume. This one's file has "model", "metric", "score" and "iteration"; it is for use, not to go
    on from.

    Args:
        metric: TASK/NAME of the evaluation's results, e.g. "segm/AP"; more is better. None: no
            model is kept.
    """

    def __init__(self, checkpointer: SafeCheckpointer, metric: str | None) -> None:
        self._model = checkpointer.model
        self._path = Path(checkpointer.save_dir) / f"{_BEST}.pth"
        self._metric = metric
        self._score = -math.inf

    def before_train(self) -> None:
        known = self.trainer.start_iter > 0 and self._path.exists()
        if self._metric is None or not known or not comm.is_main_process():
            return
        try:
            best = check_readable(self._path, ("model", "metric", "score"))
        except WeightsError as error:
            logger.warning("The best score so far is unknown: %s", error)
            return
        if best["metric"] == self._metric:
            self._score = best["score"]

    def update(self, results: dict[str, Any]) -> None:
        """Save the model if it is the best so far. An unknown metric is logged as an error.

        Args:
            results: of an evaluation of the model as it is now, {} on others than the main process.
        """
        score = score_of(results, self._metric)
        if score is None or not score > self._score:  # NaN included
            return
        content = {
            "model": self._model.state_dict(),
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


def score_of(results: dict[str, Any], metric: str | None) -> float | None:
    """A metric of an evaluation, None without a metric or results. One that they lack is logged."""
    flat = flatten_results_dict(results)
    if metric and flat and metric not in flat:
        logger.error("metric %r is not in the evaluation, which has %s", metric, sorted(flat))
    return float(flat[metric]) if metric in flat else None


def write_checkpoint(path: Path, data: Mapping[str, Any]) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        SaveError: if the file cannot be written; it says how much room there is.
    """
    try:
        with atomic_write(path) as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:
        # torch hides a failed write behind an error of its own, about where in the file it is.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise SaveError(
            f"checkpoint {path} cannot be written: {cause}; {free / 2**20:.1f} MiB are free"
        ) from error


@contextmanager
def disk_full_is_said(folder: str) -> Iterator[None]:
    """A block whose `OSError` for want of room is a `SaveError`, e.g. of metrics.json."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SaveError(
            f"no room to write in {folder}: {error}. --resume continues from the last checkpoint"
        ) from error


def holds_a_training(folder: str) -> bool:
    return (Path(folder) / _TAG).exists() or any(Path(folder).glob("model_*.pth"))


def periodic_checkpoints(folder: Path) -> list[Path]:
    """Those named for an iteration, from the first one to the last one."""
    files = (p for p in folder.glob("model_*.pth") if re.fullmatch(r"model_\d+", p.stem))
    return sorted(files, key=_iteration)


def _iteration(path: Path) -> int:
    """Of a checkpoint; -1 if that cannot be read."""
    if path.stem != _FINAL:
        return int(path.stem.removeprefix("model_"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"]
    except Exception:  # whatever a damaged file comes up with, see check_readable
        return -1


def check_readable(path: Path, parts: Iterable[str] = ("model",)) -> dict[str, Any]:
    """Read a checkpoint in which there must be `parts`.

    Raises:
        WeightsError: if it is missing, damaged or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checksums, which torch.load leaves out
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        for part in parts:
            content[part]
    except Exception as error:
        raise unreadable(path, error) from error
    return content
