"""A training: model, data, trainer and hooks, put together from a config."""

import errno
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.evaluation.testing import evaluate
from mask_rcnn_plugin.training.best_checkpointer import BestCheckpointer
from mask_rcnn_plugin.training.checkpoint import Checkpointer, SaveError, resolve_weights
from mask_rcnn_plugin.training.evaluation_hook import EvaluationHook
from mask_rcnn_plugin.training.machine import log_machine, memory_format
from mask_rcnn_plugin.training.periodic_checkpointer import PeriodicCheckpointer
from mask_rcnn_plugin.training.preemption import Preemption
from mask_rcnn_plugin.training.random_states import RandomStates, random_states_kept
from mask_rcnn_plugin.training.train_loop import build_trainer
from mask_rcnn_plugin.training.validation_loss import build_validation_loader, validation_losses
from mask_rcnn_plugin.training.zero_loss import ZeroLossWarning

logger = logging.getLogger(__name__)


class _InOneLine(logging.Filter):
    """What a user can put right is logged as its message; detectron2 logs a traceback of all."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError):
            record.msg, record.args, record.exc_info = str(error), (), None
        return True


logging.getLogger("detectron2.engine.train_loop").addFilter(_InOneLine())


def train(
    cfg: DictConfig, *, resume: bool = False, extra_hooks: Sequence[HookBase] = ()
) -> dict[str, Any]:
    """Train the model of a config, with periodic checkpoints and evaluations.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.
        resume: go on from the newest checkpoint in `train.output_dir` that can be read, if there
            is one: with its random states, and with the images that its epoch has left.
        extra_hooks: run after the others.

    Returns:
        Results of the last evaluation, as `evaluate` returns them; {} without one.

    Raises:
        WeightsError: see `resolve_weights` and `Checkpointer.resume_or_load`.
        SaveError: if there is no room for the final checkpoint, or for metrics.
        ConfigError: see `machine.precision` and `build_train_loader`.
        DatasetError: see `build_train_loader` and `TrainLoader`.
        SystemExit: with `preemption.EXIT_CODE`, after SIGTERM or SIGUSR1.
    """
    weights = resolve_weights(cfg.train.init_checkpoint) if cfg.train.init_checkpoint else ""
    log_machine(cfg)
    model: nn.Module = instantiate(cfg.model).to(cfg.train.device)
    model = model.to(memory_format=memory_format(cfg))
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model

    # No device_ids: the model moves its input itself, and detectron2's default is wrong for a CPU
    # and for a process that sees one GPU only.
    model = create_ddp_model(model, device_ids=None, **cfg.train.ddp)
    try:
        loader = instantiate(cfg.dataloader.train)
    except AssertionError as error:  # detectron2's, of a dataset with no image that is trained on
        raise DatasetError(f"training set {list(cfg.dataset.train.names)}: {error}") from error
    trainer = build_trainer(cfg, model, loader, optimizer)
    parts = {"trainer": trainer, "random": RandomStates()}
    if hasattr(loader, "state_dict"):
        parts["loader"] = loader
    else:
        logger.warning(
            "%s has no state_dict: a resume will not know which images of the epoch are left",
            type(loader).__name__,
        )
    checkpointer = Checkpointer(model, cfg.train.output_dir, **parts)
    metric = cfg.train.best_metric
    best = BestCheckpointer(checkpointer, metric) if metric else None
    saving = PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
    preemption = Preemption(saving)

    results: dict[str, Any] = {}

    def test() -> dict[str, Any]:
        with preemption.at_once(), random_states_kept():
            results.update(evaluate(cfg, model))
        if best:
            best.update(results)
        return results

    validation = None
    if cfg.train.validation_period:
        validation_loader = build_validation_loader(cfg)

        def validate() -> dict[str, Any]:
            with preemption.at_once(), random_states_kept():
                return {"validation": validation_losses(model, validation_loader)}

        validation = EvaluationHook(cfg.train.validation_period, validate, saving)

    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            saving,
            preemption,
            best,
            validation,
            EvaluationHook(cfg.train.eval_period, test, saving),
            ZeroLossWarning() if main else None,
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
            *extra_hooks,
        ]
    )
    start = 0
    checkpointer.resume_or_load(weights, resume=resume)
    if resume and checkpointer.has_checkpoint():
        start = trainer.iter + 1
        if start >= cfg.train.max_iter:
            logger.info("All %d iterations are done already, evaluating only", start)
    try:
        with preemption:
            trainer.train(start, cfg.train.max_iter)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SaveError(
            f"no room to write in {cfg.train.output_dir}: {error}. --resume goes on from the last "
            "checkpoint"
        ) from error
    return results
