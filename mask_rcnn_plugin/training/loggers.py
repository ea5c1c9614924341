"""Where the metrics of a training go: the log, and what `train.loggers` names."""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.config.printing import flatten

_WINDOW = 20  # iterations of which the median is logged, as detectron2's writers do
# A run's id, what logs an iteration's scalars in it, and what ends it, failed or not.
_Run = tuple[str, Callable[[dict[str, float], int], Any], Callable[[bool], Any]]

logger = logging.getLogger(__name__)


def check_loggers(cfg: DictConfig) -> None:
    """Raise a ConfigError if the package of a logger is not installed."""
    for name in set(_names(cfg)) - {"json"}:
        spec = find_spec(name)
        # A folder wandb/, as W&B leaves it where it has run, is found too, but has no origin.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"train.loggers has {name!r}, which is not installed: pip install {name}"
            )


def build_writers(cfg: DictConfig, *, resume: bool) -> list[EventWriter]:
    """The writers of a training, for the main process.

    Args:
        resume: go on with the runs of W&B and MLflow that the output folder knows.

    Raises:
        ConfigError: if W&B or MLflow cannot begin a run or go on with it.
    """
    folder = Path(cfg.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    writers = [CommonMetricPrinter(cfg.train.max_iter)]
    for name in _names(cfg):
        if name == "json":
            writers.append(JSONWriter(str(folder / "metrics.json")))
        elif name == "tensorboard":
            writers.append(TensorboardXWriter(str(folder)))
        else:
            writers.append(TrackingWriter(name, cfg, resume))
    return writers


def _names(cfg: DictConfig) -> list[str]:
    return list(dict.fromkeys(cfg.train.get("loggers", ("json", "tensorboard"))))


class TrackingWriter(EventWriter):
    """Logs scalars to W&B or MLflow, and the config as the run's parameters.

    A resume goes on with the run, whose id is in NAME_run_id of the output folder. Once it has
    begun, what goes wrong is logged and the training goes on.
    """

    def __init__(self, name: str, cfg: DictConfig, resume: bool) -> None:
        self._name, self._last_write = name, -1
        folder = Path(cfg.train.output_dir)
        file = folder / f"{name}_run_id"
        known = file.read_text().strip() if resume and file.is_file() else None
        begin = {"wandb": _begin_wandb, "mlflow": _begin_mlflow}[name]
        try:
            run_id, self._log, self._end = begin(known, folder, flatten(cfg, resolve=True))
        except Exception as error:  # whatever a service comes up with
            run = f"resume run {known} (delete {file} to start another)" if known else "start a run"
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"train.loggers: {name} cannot {run}: {reason}") from error
        file.write_text(run_id)

    def write(self) -> None:
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for key, (value, i) in get_event_storage().latest_with_smoothing_hint(_WINDOW).items():
            if i > self._last_write:
                new[i][key] = value
        for i in sorted(new):
            self._last_write = i
            self._try("log metrics", self._log, new[i], i)

    def close(self) -> None:
        # Signals and Ctrl-C are no Exceptions.
        self._try("end the run", self._end, isinstance(sys.exc_info()[1], Exception))

    def _try(self, what: str, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            logger.error("%s cannot %s: %s", self._name, what, error)


def _begin_wandb(run_id: str | None, folder: Path, config: dict[str, Any]) -> _Run:
    """Project, mode and so on are W&B's own environment variables, WANDB_..."""
    import wandb

    names: dict[str, Any] = {"id": run_id, "name": folder.resolve().name, "dir": str(folder)}
    run = wandb.init(**names, resume="allow", config=config, allow_val_change=True)
    return (
        run.id,
        lambda scalars, iteration: run.log(scalars, step=iteration),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def _begin_mlflow(run_id: str | None, folder: Path, config: dict[str, Any]) -> _Run:
    """Server, experiment and so on are MLflow's own environment variables, MLFLOW_..."""
    import mlflow

    run = mlflow.start_run(run_id, run_name=None if run_id else folder.resolve().name)
    if not run_id:  # a run's parameters cannot be changed
        mlflow.log_params(config)

    def log(scalars: dict[str, float], iteration: int) -> None:
        # Of names it takes these signs only. Not synchronous: it is not to wait for a server.
        scalars = {re.sub(r"[^\w./ :-]", "_", name): value for name, value in scalars.items()}
        mlflow.log_metrics(scalars, step=iteration, synchronous=False)

    return run.info.run_id, log, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED")
