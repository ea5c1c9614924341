"""A training: model, data, trainer and hooks, put together from a config."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from mask_rcnn_plugin.engine.checkpoint import Checkpointer, resolve_weights
from mask_rcnn_plugin.engine.evaluator import evaluate
from mask_rcnn_plugin.engine.train_loop import build_trainer


def train(
    cfg: DictConfig, *, resume: bool = False, extra_hooks: Sequence[HookBase] = ()
) -> dict[str, Any]:
    """Train the model of a config, with periodic checkpoints and evaluations.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.
        resume: go on from the last checkpoint in `train.output_dir`, if there is one.
        extra_hooks: run after the others.

    Returns:
        Results of the last evaluation, as `evaluate` returns them; {} without one.

    Raises:
        WeightsError: if `train.init_checkpoint` does not exist, or the checkpoint to resume from is
            of another model.
        ConfigError: see `check_precision`.
    """
    weights = resolve_weights(cfg.train.init_checkpoint) if cfg.train.init_checkpoint else ""
    model: nn.Module = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model

    # No device_ids: the model moves its input itself, and detectron2's default is wrong for a CPU
    # and for a process that sees one GPU only.
    model = create_ddp_model(model, device_ids=None, **cfg.train.ddp)
    loader = instantiate(cfg.dataloader.train)
    trainer = build_trainer(cfg, model, loader, optimizer)
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)

    results: dict[str, Any] = {}

    def test() -> dict[str, Any]:
        results.update(evaluate(cfg, model))
        return results

    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
            *extra_hooks,
        ]
    )
    start = 0
    checkpointer.resume_or_load(weights, resume=resume)
    if resume and checkpointer.has_checkpoint():
        start = trainer.iter + 1
    trainer.train(start, cfg.train.max_iter)
    return results
