#!/usr/bin/env python
"""Train a config.

    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8
    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8 --resume
    torchrun --nproc-per-node 8 train.py --config-file table2a_backbone/r50_fpn
    python train.py --config-file table4_keypoints/keypoint_and_mask+synthetic train.max_iter=100
    python train.py --config-file table2a_backbone/r50_fpn \\
        dataset.train.json=my/train.json dataset.train.images=my/images \\
        dataset.test.json=my/val.json dataset.test.images=my/images

Checkpoints, metrics.json, TensorBoard events, results.json and the log are written to
train.output_dir, output/CONFIG by default. A mistake in the arguments ends the run with exit code 2
and one line, before anything is written. For torchrun, srun and several machines see
docs/cluster.md.
"""

import argparse
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin.training import SafeCheckpointer, resolve_weights, setup_datasets  # isort: split

from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, default_setup, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.data.annotation_file import keep_decoded
from mask_rcnn_plugin.data.garbage import collection_paused
from mask_rcnn_plugin.errors import UserError, counted
from mask_rcnn_plugin.evaluation.testing import evaluate as do_test
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.training.batch_scaling import fit_batch, fit_epochs
from mask_rcnn_plugin.training.checkpoint import (
    BestModelHook,
    CheckpointHook,
    disk_full_is_said,
    holds_a_training,
)
from mask_rcnn_plugin.training.early_stopping import EarlyStopping, StoppedEarly
from mask_rcnn_plugin.training.eval_hook import SafeEvalHook
from mask_rcnn_plugin.training.guarded_trainer import build_trainer
from mask_rcnn_plugin.training.launch import log_processes, parse_program_args, run_program
from mask_rcnn_plugin.training.loggers import build_writers, check_loggers
from mask_rcnn_plugin.training.machine import memory_format, optimizer_node, precision
from mask_rcnn_plugin.training.next_steps import next_steps
from mask_rcnn_plugin.training.pictures import PictureHook
from mask_rcnn_plugin.training.preemption import Preemption
from mask_rcnn_plugin.training.preflight import check_datasets
from mask_rcnn_plugin.training.random_states import RandomStates
from mask_rcnn_plugin.training.setup import check_initialization, images_left, make_output_dir
from mask_rcnn_plugin.training.validation_loss import build_validation_loader, validation_losses
from mask_rcnn_plugin.training.weight_average import WeightAverage
from mask_rcnn_plugin.weights import download

logger = logging.getLogger("mask_rcnn_plugin")


def do_train(
    cfg: DictConfig, *, resume: bool = False, extra_hooks: Sequence[HookBase] = ()
) -> dict[str, Any]:
    """Train the model of a config, as detectron2's tools/lazyconfig_train_net.py does.

    Model, data and random numbers come in its order, so the losses of a seed are the same.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.
        resume: go on from the newest checkpoint in `train.output_dir` that can be read, if any.
        extra_hooks: run after the others.

    Returns:
        Results of the last evaluation, as `do_test` returns them; {} without one.

    Raises:
        WeightsError: see `SafeCheckpointer.resume_or_load`.
        SaveError: if there is no room for the final checkpoint, or for metrics.
        NonFiniteLossError: see `GuardedTrainer`.
        ConfigError, DatasetError: see `build_train_loader`.
        SystemExit: with `preemption.EXIT_CODE`, after SIGTERM or SIGUSR1.
    """
    logger.info(
        "Device %s, weights %s, computing in %s",
        *(device_of(cfg), memory_format(cfg), precision(cfg) or "torch.float32"),
    )
    model = instantiate(cfg.model)
    logger.info("Model:\n%s", model)
    model.to(device_of(cfg), memory_format=memory_format(cfg))

    if cfg.train.get("compile_backbone"):
        model.backbone.compile(dynamic=True)  # in place: names and state dict stay

    cfg.optimizer.params.model = model
    optim = instantiate(optimizer_node(cfg))
    del cfg.optimizer.params.model

    with images_left(cfg), collection_paused():
        train_loader = instantiate(cfg.dataloader.train)
    keep_decoded(False)

    average = None
    if cfg.train.get("ema") and cfg.train.ema.enabled:
        average = WeightAverage(model, cfg.train.ema.decay)
    # No device_ids: the model moves its input itself, and detectron2's default is wrong for a CPU
    # and for a process that sees one GPU only.
    model = create_ddp_model(model, **{"device_ids": None, **cfg.train.ddp})
    trainer = build_trainer(cfg, model, train_loader, optim)
    parts = {"trainer": trainer, "random": RandomStates()}
    if hasattr(train_loader, "state_dict"):
        parts["loader"] = train_loader
    else:
        logger.warning(
            "%s has no state_dict: a resume will not know which images of the epoch are left",
            type(train_loader).__name__,
        )
    tested = average.model if average else model
    checkpointer = SafeCheckpointer(tested, cfg.train.output_dir, **parts)
    checkpointer.class_names = (cfg.dataset.get("metadata") or {}).get("thing_classes", ())
    saving = CheckpointHook(checkpointer, **cfg.train.checkpointer)
    preemption = Preemption(saving)
    if not cfg.dataset.test.names:
        logger.warning(
            "There is no test set: nothing is evaluated, no best model is kept and early stopping "
            "is off. dataset.split=0.1 holds out a tenth of the training images"
        )
    stopping = EarlyStopping(saving, **(cfg.train.get("early_stopping") or {}))
    best = BestModelHook(checkpointer, cfg.train.best_metric or stopping.metric)
    pictures = PictureHook(cfg)

    results: dict[str, Any] = {}

    def test() -> dict[str, Any]:
        results.update(do_test(cfg, tested))
        best.update(results)
        stopping.update(results)
        pictures.draw_test()
        return results

    validation = None
    if cfg.train.validation_period:
        validation_loader = build_validation_loader(cfg)
        validation = SafeEvalHook(
            cfg.train.validation_period,
            lambda: {"validation": validation_losses(tested, validation_loader, trainer.autocast)},
            saving,
            preemption,
        )
    writers: list[EventWriter] = []  # in the main process
    on_main_process(lambda: writers.extend(build_writers(cfg, resume=resume)))
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            average,
            saving,
            preemption,
            best,
            pictures,
            validation,
            SafeEvalHook(cfg.train.eval_period, test, saving, preemption)
            if cfg.dataset.test.names
            else None,
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if writers else None,
            *extra_hooks,
            stopping,
        ]
    )

    start_iter = 0
    if checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume):
        start_iter = trainer.iter + 1
        if start_iter >= cfg.train.max_iter:
            logger.info("All %d iterations are already done, evaluating only", start_iter)
    with disk_full_is_said(cfg.train.output_dir), preemption, suppress(StoppedEarly):
        trainer.train(start_iter, cfg.train.max_iter)
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in train.output_dir",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="start without checking the datasets"
    )
    return parse_program_args(parser)


def prepare(args: argparse.Namespace, cfg: DictConfig) -> None:
    """Check and complete the config as far as possible without building anything."""
    there = on_main_process(lambda: holds_a_training(cfg.train.output_dir))
    if there and not args.resume:
        raise ConfigError(
            f"{cfg.train.output_dir} already holds a training run: add --resume to continue it, or "
            "give another train.output_dir=..."
        )
    complete(cfg, resumed=there)


def complete(cfg: DictConfig, *, resumed: bool = False) -> None:
    """`prepare` without the check of the output folder; every process calls this."""
    if cfg.train.init_checkpoint:
        on_main_process(lambda: resolve_weights(cfg.train.init_checkpoint))
    on_main_process(lambda: check_loggers(cfg))
    if not resumed:
        check_initialization(cfg)
    fit_batch(cfg)
    keep_decoded(True)  # until the training's loader is made
    setup_datasets(cfg)
    fit_epochs(cfg)


def start(args: argparse.Namespace, cfg: DictConfig) -> None:
    """Check the datasets, make the output folder and open the log; every process calls this."""
    if not args.no_check:
        check_datasets(cfg, args.config, args.overrides)
    make_output_dir(cfg)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mask_rcnn_plugin")
    log_processes(cfg)


def run(args: argparse.Namespace, cfg: DictConfig) -> None:
    """What each process does."""
    if not args.resume:
        on_main_process(lambda: download(cfg.train.init_checkpoint))
    config = Path(cfg.train.output_dir, "config.yaml")
    before = config.read_bytes() if config.is_file() else b""
    start(args, cfg)
    classes = MetadataCatalog.get(cfg.dataset.train.names[0]).thing_classes
    logger.info("%s: %s", counted(len(classes), "class", "classes"), ", ".join(classes))
    begun: list[Any] = []  # filled when what there was to load is loaded
    note = hooks.CallbackHook(before_train=begun.append)
    try:
        results = do_train(cfg, resume=args.resume, extra_hooks=[note])
    except UserError:
        if before and not begun and comm.is_main_process():
            config.write_bytes(before)  # this config is not that of the run in the folder
        raise
    if comm.is_main_process():
        logger.info(next_steps(cfg, results, args.config, args.overrides))


def main() -> None:
    run_program(parse_args(), prepare, run)


if __name__ == "__main__":
    main()
