"""Weights in and out."""

import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer

from mask_rcnn_plugin.atomic_write import SUFFIX, atomic_write
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training import safe_pickle

FINAL, BEST = "model_final", "model_best"


class WeightsError(UserError):
    """Weights that do not exist, cannot be read or do not fit the model; the message says which."""


class SaveError(UserError):
    """A checkpoint that cannot be written, e.g. as the disk is full; what was there is left."""


class _SafeReader(FvcoreCheckpointer):
    """What detectron2's checkpointer reads a .pth file with."""

    def _load_file(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=True)


class Checkpointer(DetectionCheckpointer, _SafeReader):
    """detectron2's checkpointer, for files that may be damaged or of others.

    What a training starts from may fit the model in part, as an ImageNet backbone does. What is
    evaluated or resumed must cover the whole model: detectron2 would leave what does not fit at
    random, with a warning.

    A file is written whole or not at all, and named in `last_checkpoint` only afterwards. No file
    can run code by being read: .pkl by `safe_pickle`, .pth and .pyth by torch's `weights_only`.

    Attributes:
        saved_iteration: the last one that `save` was given and has written; -1 before.
    """

    saved_iteration = -1
    _strict = False
    _path = ""

    def load_strictly(self, path: str) -> None:
        """Load a model's weights for inference.

        Args:
            path: what `resolve_weights` returns.

        Raises:
            WeightsError: if the file cannot be read, or if a parameter of the model is missing from
                it or has another shape, e.g. because the config has another number of classes or a
                branch more.
        """
        self._strict = True
        try:
            self._load_weights(path)
        except OSError as error:  # of a download
            raise WeightsError(f"weights {path} cannot be loaded: {error!r}") from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As fvcore's, but goes on from the newest checkpoint that can be read.

        That is the one that `last_checkpoint` names or, should it be damaged, which is logged, the
        one of the latest iteration. All processes call this and read the same file.

        Raises:
            WeightsError: as `load_strictly`, for a checkpoint of another model; if there are
                checkpoints and none can be read; or if `path` cannot be.
        """
        newest: str | WeightsError | None = None
        if comm.is_main_process():
            for left_over in Path(self.save_dir).glob(f"*.pth{SUFFIX}"):
                left_over.unlink()
            if resume:
                try:
                    newest = self._newest()
                except WeightsError as error:
                    newest = error
        newest = comm.all_gather(newest)[0]
        if isinstance(newest, WeightsError):
            raise newest
        if newest is None:
            try:
                return self._load_weights(path)
            except OSError as error:  # of a download, on a machine without internet
                raise WeightsError(
                    f"weights {path} cannot be loaded ({error}): download them where there is "
                    "internet, and give the file: train.init_checkpoint=FILE"
                ) from error
        if not all(comm.all_gather(Path(newest).is_file())):
            raise WeightsError(
                f"{newest} is not there on all machines: to resume, train.output_dir must be on a "
                "disk that they share"
            )
        self._strict = True
        return self.load(newest)

    def has_checkpoint(self) -> bool:
        """Whether there is one to resume from, damaged or not."""
        return bool(self._candidates())

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        finally:  # detectron2's main keeps it after an error, and refuses to load again
            self._parsed_url_during_load = None

    def _load_weights(self, path: str) -> dict[str, Any]:
        try:
            return self.load(path, checkpointables=[])
        except (WeightsError, OSError):
            raise
        except Exception as error:  # whatever a file of something else comes up with
            raise WeightsError(f"weights {path} cannot be loaded: {error!r}") from error

    def save(self, name: str, **kwargs: Any) -> None:
        """As fvcore's, but all processes call it, as some of the states are gathered from all.

        Raises:
            SaveError: in all processes, if the main one cannot write the file.
        """
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        error = None
        if self.save_dir and self.save_to_disk:
            path = Path(self.save_dir) / f"{name}.pth"
            self.logger.info("Saving checkpoint to %s", path)
            try:
                write_checkpoint(path, data | kwargs)
                self.tag_last_checkpoint(path.name)
            except SaveError as caught:
                error = caught
        error = comm.all_gather(error)[0]
        if error is not None:
            raise error
        self.saved_iteration = kwargs.get("iteration", -1)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = Path(self.save_dir) / "last_checkpoint"
        try:
            with atomic_write(path) as file:
                file.write(last_filename_basename.encode())
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error}") from error

    def _candidates(self) -> list[Path]:
        """Checkpoints to resume from, the tagged one first, then by iteration from the last one."""
        folder = Path(self.save_dir)
        try:
            tagged = [Path(self.get_checkpoint_file())] if super().has_checkpoint() else []
        except UnicodeDecodeError:  # damaged itself, as `_newest` will say
            tagged = [folder / "last_checkpoint"]
        others = [*periodic_checkpoints(folder), *folder.glob(f"{FINAL}.pth")]
        others.sort(key=_iteration, reverse=True)
        return tagged + [path for path in others if path not in tagged]

    def _newest(self) -> str | None:
        candidates = self._candidates()
        for path in candidates:
            try:
                # Weights alone, as another program's, are nothing to go on from.
                check_readable(path, {"model"} | self.checkpointables.keys() & {"trainer"})
            except WeightsError as error:
                self.logger.warning("Not resumed from: %s", error)
            else:
                return str(path)
        if candidates:
            raise WeightsError(
                f"none of the checkpoints in {self.save_dir} can be read: "
                f"{', '.join(path.name for path in candidates)}. Delete last_checkpoint and them "
                "to train from the start"
            )
        return None

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                return _read_pkl(filename)
            if filename.endswith(".pyth"):
                weights = _SafeReader._load_file(self, filename)["model_state"]
                weights = {k: v for k, v in weights.items() if "num_batches_tracked" not in k}
                return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
            return super()._load_file(filename)
        except Exception as error:  # whatever unpickling comes up with
            raise _unreadable(filename, error) from error

    def _load_model(self, checkpoint: Any) -> Any:
        # fvcore calls it before it touches the optimizer.
        incompatible = super()._load_model(checkpoint)
        if self._strict:
            _check_complete(self._path, incompatible)
        return incompatible


def write_checkpoint(path: Path, data: Mapping[str, Any]) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        SaveError: if the file cannot be written; it says how much room there is and is needed.
    """
    try:
        with atomic_write(path) as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:
        # torch hides a failed write behind an error of its own, about where in the file it is.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        size: Any = _Size()
        torch.save(data, size)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise SaveError(
            f"checkpoint {path} cannot be written: {cause}; it needs {size.count / 2**20:.1f} MiB, "
            f"{free / 2**20:.1f} MiB are free. Checkpoints written before are left as they were"
        ) from error


class _Size:
    """A file that forgets what is written to it."""

    count = 0

    def write(self, data: bytes) -> int:
        self.count += len(data)
        return len(data)

    def flush(self) -> None: ...


def periodic_checkpoints(folder: Path) -> list[Path]:
    """Those named for an iteration, from the first one to the last one."""
    return sorted(
        (p for p in folder.glob("model_*.pth") if re.fullmatch(r"model_\d+", p.stem)),
        key=lambda path: int(path.stem.removeprefix("model_")),
    )


def _iteration(path: Path) -> int:
    """Of a checkpoint; -1 if that cannot be read."""
    if path.stem != FINAL:
        return int(path.stem.removeprefix("model_"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"]
    except Exception:  # whatever a damaged file comes up with, see check_readable
        return -1


def check_readable(path: Path, parts: Iterable[str] = ("model",)) -> None:
    """
    Args:
        path: of a checkpoint.
        parts: what must be in it.

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
        raise _unreadable(path, error) from error


def _read_pkl(filename: str) -> dict[str, Any]:
    """Weights of detectron2's, Detectron's, Caffe2's or MSRA's, as detectron2 tells them apart."""
    with PathManager.open(filename, "rb") as file:
        data = safe_pickle.load(file)
    if "model" in data and "__author__" in data:
        return data
    weights = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _unreadable(path: str | Path, error: Exception) -> WeightsError:
    # torch's message is a page of advice to trust the file.
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    what = (
        f"it asks for {unsafe[1]}, which no weights need and which was not run"
        if unsafe
        else f"it is empty, damaged or no checkpoint ({type(error).__name__} {reason})"
    )
    return WeightsError(f"weights {path} cannot be loaded: {what}")


def _check_complete(path: str, incompatible: Any) -> None:
    wrong = incompatible.incorrect_shapes
    missing = [k for k in incompatible.missing_keys if k not in {w[0] for w in wrong}]
    shapes = [f"{k}: {list(got)} in the file, {list(want)} in the model" for k, got, want in wrong]
    if missing or shapes:
        raise WeightsError(
            f"weights {path} do not fit the model of this config; "
            + "; ".join(
                ([f"missing: {_some(missing)}"] if missing else [])
                + ([f"other shapes: {_some(shapes)}"] if shapes else [])
            )
        )


def _some(items: list[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def resolve_weights(weights: str) -> str:
    """What to load for a user's `--weights` or `train.init_checkpoint`.

    Args:
        weights: a file; an address that detectron2 resolves (detectron2://..., catalog://...,
            https://...), which is downloaded by the loading; or a model-zoo name such as
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", where detectron2 has its model_zoo.

    Returns:
        A path or address for `Checkpointer.load`.

    Raises:
        WeightsError: if there is no such file or zoo model.
    """
    if "://" in weights or Path(weights).is_file():
        return weights
    if weights.startswith("COCO-") or weights.startswith("LVIS"):
        try:
            from detectron2 import model_zoo
        except ImportError as error:
            raise WeightsError(
                f"weights {weights!r} name a model of detectron2's zoo, but this detectron2 has no "
                "usable detectron2.model_zoo: give the downloaded file or a detectron2:// address"
            ) from error
        try:
            return model_zoo.get_checkpoint_url(weights.removesuffix(".yaml") + ".yaml")
        except RuntimeError as error:
            raise WeightsError(f"weights {weights!r}: {error}") from error
    folder = Path(weights).parent
    if folder.is_dir():
        there = sorted(f.name for f in folder.iterdir() if f.suffix in (".pth", ".pkl", ".pyth"))
        raise WeightsError(f"weights file {weights!r} does not exist; {folder} has {there}")
    raise WeightsError(f"weights file {weights!r} does not exist, nor does its folder {folder}")
