#!/usr/bin/env python
"""Train RPN and Mask R-CNN apart from each other, as the paper does.

    python tools/train_stages.py --regime separate --config-file table2a_backbone/r50_fpn
    python tools/train_stages.py --regime 4step --config-file table2a_backbone/r50_fpn --num-gpus 8

separate (Sec. 3.1): an RPN, then Mask R-CNN with a backbone of its own on the RPN's proposals.
4step (Sec. 4.4): RPN; Mask R-CNN on its proposals; RPN on that one's backbone, which is fixed from
here on; heads on the new proposals. Ends in one model, model_final.pth, for eval.py and the same
config.

Each stage runs the config's whole schedule in a folder of its own in train.output_dir, by default
output/CONFIG-REGIME. The same command goes on where an earlier one stopped: finished stages are not
run again, an interrupted one starts from its last checkpoint. A mistake in the arguments ends with
exit code 2 and one line that says what is there instead, before anything is written.
"""

import argparse
import os
import sys
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

import torch
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.engine import resolve_weights, setup_datasets, train_stages
from mask_rcnn_plugin.engine.checkpoint import WeightsError
from mask_rcnn_plugin.engine.rpn_regimes import CHECKPOINT, REGIMES, check_stages
from mask_rcnn_plugin.engine.trainer import check_precision
from mask_rcnn_plugin.evaluation import results_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regime", required=True, choices=REGIMES)
    parser.add_argument(
        "--config-file",
        dest="config",
        required=True,
        metavar="CFG",
        help="short name or path of a config, with overlays behind a plus: NAME+synthetic",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of this machine to use")
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
    if not any(override.startswith("train.output_dir=") for override in args.overrides):
        cfg.train.output_dir += f"-{args.regime}"
    if cfg.train.init_checkpoint:
        resolve_weights(cfg.train.init_checkpoint)
    check_precision(cfg)
    setup_datasets(cfg)
    check_stages(cfg, args.regime)
    return cfg


def run(args: argparse.Namespace, cfg: DictConfig | None) -> None:
    """What each process does."""
    cfg = cfg or prepare(args)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mask_rcnn_plugin")
    results = train_stages(cfg, args.regime)
    if not comm.is_main_process():
        return
    folder = Path(cfg.train.output_dir)
    if args.regime == "separate":
        folder /= "2_detector"
    if results:
        print(results_table(results))
        print(f"{folder / 'results.json'}: the same and the AP of each category")
    print(f"{folder / CHECKPOINT}: the model")


def main() -> None:
    args = parse_args()
    try:
        cfg = prepare(args)
        # Spawned processes have catalogs of their own and prepare themselves.
        alone = cfg if args.num_gpus == 1 else None
        launch(run, args.num_gpus, dist_url="auto", args=(args, alone))
    except (ConfigError, DatasetError, WeightsError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
