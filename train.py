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
import os
import sys
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.engine import resolve_weights, setup_datasets, train
from mask_rcnn_plugin.engine.checkpoint import WeightsError
from mask_rcnn_plugin.engine.trainer import check_precision


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        dest="config",
        required=True,
        metavar="CFG",
        help="short name or path of a config, with overlays behind a plus: NAME+synthetic",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of this machine to use")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in train.output_dir"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_intermixed_args()
    visible = torch.cuda.device_count()
    if args.num_gpus < 1 or (args.num_gpus > 1 and args.num_gpus > visible):
        parser.error(f"--num-gpus is {args.num_gpus}, must be from 1 to the {visible} visible GPUs")
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        if int(os.environ.get(variable, 1)) > 1:
            parser.error(
                f"{variable} is {os.environ[variable]}: this starts its processes itself, "
                "use --num-gpus, not torchrun or srun with several tasks"
            )
    return args


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


def run(args: argparse.Namespace, cfg: DictConfig | None) -> None:
    """What each process does."""
    cfg = cfg or prepare(args)
    default_setup(cfg, args)
    logger = setup_logger(
        cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mask_rcnn_plugin"
    )
    classes = MetadataCatalog.get(cfg.dataset.train.names[0]).thing_classes
    logger.info("%d classes: %s", len(classes), ", ".join(classes))
    train(cfg, resume=args.resume)


def main() -> None:
    args = parse_args()
    try:
        cfg = prepare(args)
        # Spawned processes have catalogs of their own and prepare themselves.
        alone = cfg if args.num_gpus == 1 else None
        launch(run, args.num_gpus, dist_url="auto", args=(args, alone))
    except (ConfigError, DatasetError, WeightsError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
