#!/usr/bin/env python
"""Train a config.

    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8
    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8 --resume
    torchrun --nproc-per-node 8 train.py --config-file table2a_backbone/r50_fpn
    python train.py --config-file table4_keypoints/keypoint_and_mask+synthetic train.max_iter=100
    python train.py --config-file table2a_backbone/r50_fpn \\
        dataset.train.json=my/train.json dataset.train.images=my/images \\
        dataset.test.json=my/val.json dataset.test.images=my/images

With --print-config or --diff BASE it prints the config, or what it has otherwise than another, and
does nothing else.

Checkpoints, metrics.json, TensorBoard events, results.json and the log land in train.output_dir,
output/CONFIG by default. A mistake in the arguments ends with exit code 2 and one line that says
what is there instead, before anything is written. For torchrun, srun and several machines see
docs/cluster.md.
"""

import argparse
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin.training import resolve_weights, setup_datasets, train  # isort: split

from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.training.batch_scaling import fit_batch
from mask_rcnn_plugin.training.checkpoint import BEST, FINAL, periodic_checkpoints
from mask_rcnn_plugin.training.launch import launch, log_processes, parse_launch_args
from mask_rcnn_plugin.training.preflight import check_datasets
from mask_rcnn_plugin.training.setup import make_output_dir


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in train.output_dir"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="start without checking the data sets"
    )
    return parse_launch_args(parser)


def prepare(args: argparse.Namespace, cfg: DictConfig) -> None:
    """Check and complete the config as far as possible without building anything."""
    folder = Path(cfg.train.output_dir)
    files = ("last_checkpoint", f"{FINAL}.pth", f"{BEST}.pth")
    there = any((folder / name).exists() for name in files) or periodic_checkpoints(folder)
    if there and not args.resume:
        raise ConfigError(
            f"{cfg.train.output_dir} holds a training already: add --resume to go on with it, or "
            "give another train.output_dir=..."
        )
    if cfg.train.init_checkpoint:
        resolve_weights(cfg.train.init_checkpoint)
    fit_batch(cfg)
    setup_datasets(cfg)


def run(args: argparse.Namespace, cfg: DictConfig) -> None:
    """What each process does."""
    if not args.no_check:
        check_datasets(cfg, args.config, args.overrides)
    make_output_dir(cfg)
    default_setup(cfg, args)
    logger = setup_logger(
        cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mask_rcnn_plugin"
    )
    log_processes(cfg)
    classes = MetadataCatalog.get(cfg.dataset.train.names[0]).thing_classes
    logger.info("%d classes: %s", len(classes), ", ".join(classes))
    train(cfg, resume=args.resume)


def main() -> None:
    launch(parse_args(), prepare, run)


if __name__ == "__main__":
    main()
