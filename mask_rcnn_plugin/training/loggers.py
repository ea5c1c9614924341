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

logger = logging.getLogger(__name__)


def check_loggers(cfg: DictConfig) -> None:
    """
    Raises:
        ConfigError: if the package of a logger is not installed.
    """
    for name in _names(cfg):
        spec = None if name == "json" else find_spec(name)
        # A folder wandb/, as W&B leaves it where it has run, is found too, but has no origin.
        if name != "json" and (spec is None or spec.origin is None):
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
    folder = cfg.train.output_dir
    makers: dict[str, Callable[[], EventWriter]] = {
        "json": lambda: JSONWriter(f"{folder}/metrics.json"),
        "tensorboard": lambda: TensorboardXWriter(folder),
        "wandb": lambda: WandbWriter(cfg, resume),
        "mlflow": lambda: MLflowWriter(cfg, resume),
    }
    return [CommonMetricPrinter(cfg.train.max_iter), *(makers[name]() for name in _names(cfg))]


def _names(cfg: DictConfig) -> list[str]:
    return list(dict.fromkeys(cfg.train.get("loggers", ("json", "tensorboard"))))


class TrackingWriter(EventWriter):
    """Logs scalars to a tracking service, and the config as the run's parameters.

    A resume goes on with the run, whose id is in NAME_run_id of the output folder. Once it has
    begun, what goes wrong is logged and the training goes on.
    """

    name: str

    def __init__(self, cfg: DictConfig, resume: bool) -> None:
        self._last_write = -1
        folder = Path(cfg.train.output_dir)
        file = folder / f"{self.name}_run_id"
        known = file.read_text().strip() if resume and file.is_file() else None
        try:
            run_id = self.begin(known, folder, flatten(cfg, resolve=True))
        except Exception as error:  # whatever a service comes up with
            run = f"go on with run {known} (to begin another, delete {file})" if known else "begin"
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"train.loggers: {self.name} cannot {run}: {reason}") from error
        file.write_text(run_id)

    def begin(self, run_id: str | None, folder: Path, config: dict[str, Any]) -> str:
        """Begin a run, or go on with one, and return its id."""
        raise NotImplementedError

    def log(self, scalars: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def end(self, *, failed: bool) -> None:
        raise NotImplementedError

    def write(self) -> None:
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for key, (value, i) in get_event_storage().latest_with_smoothing_hint(_WINDOW).items():
            if i > self._last_write:
                new[i][key] = value
        for i in sorted(new):
            self._last_write = i
            try:
                self.log(new[i], i)
            except Exception as error:
                logger.error("%s: metrics of iteration %d are not logged: %s", self.name, i, error)

    def close(self) -> None:
        try:
            # Signals and Ctrl-C are no Exceptions.
            self.end(failed=isinstance(sys.exc_info()[1], Exception))
        except Exception as error:
            logger.error("%s: the run is not ended: %s", self.name, error)


class WandbWriter(TrackingWriter):
    """Weights & Biases; project, mode and so on are its environment variables', WANDB_..."""

    name = "wandb"

    def begin(self, run_id: str | None, folder: Path, config: dict[str, Any]) -> str:
        import wandb

        self._run = wandb.init(
            id=run_id,
            resume="allow",
            dir=str(folder),
            name=folder.resolve().name,
            config=config,
            allow_val_change=True,
        )
        return self._run.id

    def log(self, scalars: dict[str, float], iteration: int) -> None:
        self._run.log(scalars, step=iteration)

    def end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowWriter(TrackingWriter):
    """MLflow; server, experiment and so on are its environment variables', MLFLOW_..."""

    name = "mlflow"

    def begin(self, run_id: str | None, folder: Path, config: dict[str, Any]) -> str:
        import mlflow

        run = mlflow.start_run(run_id, run_name=None if run_id else folder.resolve().name)
        if not run_id:  # a run's parameters cannot be changed
            mlflow.log_params(config)
        return run.info.run_id

    def log(self, scalars: dict[str, float], iteration: int) -> None:
        import mlflow

        # Of names it takes these signs only. Not synchronous: it is not to wait for a server.
        scalars = {re.sub(r"[^\w./ :-]", "_", name): value for name, value in scalars.items()}
        mlflow.log_metrics(scalars, step=iteration, synchronous=False)

    def end(self, *, failed: bool) -> None:
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")
