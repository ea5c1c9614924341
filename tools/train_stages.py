#!/usr/bin/env python
"""Train RPN and Mask R-CNN apart from each other, as the paper does.

    python tools/train_stages.py --regime separate --config-file table2a_backbone/r50_fpn
    python tools/train_stages.py --regime 4step --config-file table2a_backbone/r50_fpn --num-gpus 8

separate (Sec. 3.1): an RPN, then Mask R-CNN with a backbone of its own on the RPN's proposals.
4step (Sec. 4.4): RPN; Mask R-CNN on its proposals; RPN on that one's backbone, which is fixed from
here on; heads on the new proposals. Ends in one model, model_final.pth, for eval.py and the same
config.

Each stage runs the config's whole schedule in a folder of its own in train.output_dir, by default
output/CONFIG-REGIME. The same command continues where it stopped: finished stages are not run
again, an interrupted one resumes from its last checkpoint. A mistake in the arguments ends the run
with exit code 2 and one line that says what is available instead, before anything is written.
"""

import argparse
import sys
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin.main_process import on_main_process  # isort: split

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.evaluation import results_table
from mask_rcnn_plugin.training.launch import parse_program_args, run_program

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of train.py
from train import complete, start
from train_stages.regimes import (
    CHECKPOINT,
    RECORD,
    REGIMES,
    check_record,
    read_record,
    train_stages,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regime", required=True, choices=REGIMES)
    parser.add_argument(
        "--no-check", action="store_true", help="start without checking the datasets"
    )
    return parse_program_args(parser)


def prepare(args: argparse.Namespace, cfg: DictConfig) -> None:
    """Check and complete the config as far as possible without building anything."""
    given = any(o.removeprefix("+").startswith("train.output_dir=") for o in args.overrides)
    # The config.yaml of a folder of stages names that folder.
    if not given and not on_main_process((Path(cfg.train.output_dir) / RECORD).is_file):
        cfg.train.output_dir += f"-{args.regime}"
    complete(cfg)
    if comm.is_main_process():  # what it finds in the folder counts
        check_record(cfg, args.regime, read_record(cfg, args.regime))


def run(args: argparse.Namespace, cfg: DictConfig) -> None:
    """What each process does."""
    start(args, cfg)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="train_stages")
    results = train_stages(cfg, args.regime)
    if not comm.is_main_process():
        return
    folder = Path(cfg.train.output_dir)
    if args.regime == "separate":
        folder /= "2_detector"
    if results:
        print(results_table(results))
        print(f"{folder / 'results.json'}: these numbers, and the AP of each category")
    print(f"{folder / CHECKPOINT}: the model")


def main() -> None:
    run_program(parse_args(), prepare, run)


if __name__ == "__main__":
    main()
