#!/usr/bin/env python
"""Train a config.

    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8
    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8 --resume
    python train.py --config-file table4_keypoints/keypoint_and_mask+synthetic train.max_iter=100
    python train.py --config-file table2a_backbone/r50_fpn \\
        dataset.train.json=my/train.json dataset.train.images=my/images \\
        dataset.test.json=my/val.json dataset.test.images=my/images

Checkpoints, metrics.json, TensorBoard events, results.json and the log land in train.output_dir,
output/CONFIG by default. A mistake in the arguments ends with exit code 2 and one line that says
what is there instead, before anything is written.
"""

import argparse
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.engine import resolve_weights, setup_datasets, train
from mask_rcnn_plugin.engine.launch import launch_training, parse_training_args
from mask_rcnn_plugin.engine.preflight import check_datasets
from mask_rcnn_plugin.engine.train_loop import check_precision


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
    return parse_training_args(parser)


def prepare(args: argparse.Namespace) -> DictConfig:
    """The config, checked as far as possible without building anything."""
    cfg = get_config(args.config, args.overrides)
    if not args.resume and (Path(cfg.train.output_dir) / "last_checkpoint").exists():
        raise ConfigError(
            f"{cfg.train.output_dir} holds a training already: add --resume to go on with it, or "
            "give another train.output_dir=..."
        )
    if cfg.train.init_checkpoint:
        resolve_weights(cfg.train.init_checkpoint)
    check_precision(cfg)
    setup_datasets(cfg)
    return cfg


def run(args: argparse.Namespace, cfg: DictConfig) -> None:
    """What each process does."""
    if not args.no_check:
        check_datasets(cfg, args.config, args.overrides)
    default_setup(cfg, args)
    logger = setup_logger(
        cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mask_rcnn_plugin"
    )
    classes = MetadataCatalog.get(cfg.dataset.train.names[0]).thing_classes
    logger.info("%d classes: %s", len(classes), ", ".join(classes))
    train(cfg, resume=args.resume)


def main() -> None:
    launch_training(parse_args(), prepare, run)


if __name__ == "__main__":
    main()
