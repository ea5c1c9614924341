#!/usr/bin/env python
"""Evaluate weights with COCO's metrics.

    python eval.py --config-file table2a_backbone/r50_fpn --weights output/.../model_final.pth
    python eval.py --config-file table2a_backbone/r50_fpn \\
        --weights detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504.pkl
    python eval.py --config-file CFG --weights FILE --num-gpus 8
    python eval.py --config-file CFG --predictions output/.../coco_instances_results.json

Writes to --output: results.json (AP for each task and category), coco_instances_results.json (the
predictions in COCO's format) and, with --visualize N, pictures/ of N images with their ground truth
and the predictions. --report adds report/index.html, what the model gets wrong: AP by class and
size, curves with the best threshold, a confusion matrix and the worst images; see docs/report.md.
--predictions scores such a file again, without a model. The model is first optimized for inference,
with the same results; --no-optimize leaves it as it is. AP is computed by the fastest backend that
is installed: detectron2's compiled evaluation, faster-coco-eval or pycocotools. results.json names
it; --official takes pycocotools. For a row of the paper's tables on COCO, the paper's numbers are
printed too. A test set without annotations, such as COCO's test-dev, gives no AP but submission/,
the files for COCO's server. Several processes share the images and give the same numbers as one;
for torchrun and srun see docs/cluster.md. A mistake in the arguments ends the run with exit code 2
and one line that says what is available instead, before anything is written.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import optimize_for_inference  # isort: split

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.config.loading import base_name
from mask_rcnn_plugin.config.paper import row_of
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.evaluation import PREDICTIONS_FILE, results_table
from mask_rcnn_plugin.evaluation.pictures import draw_predictions
from mask_rcnn_plugin.evaluation.report import write_report
from mask_rcnn_plugin.evaluation.results import write_results
from mask_rcnn_plugin.evaluation.testing import evaluate, evaluator_of
from mask_rcnn_plugin.inference.predictor import find_weights
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.training import SafeCheckpointer, setup_datasets
from mask_rcnn_plugin.training.launch import log_processes, parse_program_args, run_program
from mask_rcnn_plugin.training.setup import make_output_dir


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights",
        metavar="FILE",
        help="a file, a training's output folder, a detectron2:// address or a model-zoo name",
    )
    source.add_argument(
        "--predictions", type=Path, metavar="FILE", help="predictions to score, in COCO's format"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="default: train.output_dir of the config, or the folder of --predictions",
    )
    parser.add_argument(
        "--visualize", type=int, default=0, metavar="N", help="draw N images with predictions"
    )
    parser.add_argument(
        "--report", action="store_true", help="write report/, what the model gets wrong"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="lowest score of a prediction that --visualize draws (default: 0.5) and that --report "
        "compares with the ground truth (default: the best for each class)",
    )
    parser.add_argument(
        "--no-optimize",
        action="store_true",
        help="run the model as trained, without optimize_for_inference",
    )
    parser.add_argument(
        "--official",
        action="store_true",
        help="compute AP with pycocotools, even if something faster is installed",
    )
    args = parse_program_args(parser)
    if not (args.weights or args.predictions):
        parser.error("one of --weights and --predictions is required")
    if args.visualize < 0:
        parser.error(f"--visualize is {args.visualize}, must be 0 or more")
    if args.confidence_threshold is not None and not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold is {args.confidence_threshold}, must be from 0 to 1")
    return args


def prepare(args: argparse.Namespace, cfg: DictConfig) -> None:
    """Check and complete the config as far as possible without building anything."""
    if args.predictions:
        if not args.predictions.is_file():
            raise UserError(f"predictions file {str(args.predictions)!r} does not exist")
        cfg.train.output_dir = args.output or str(args.predictions.parent)
    else:
        cfg.train.output_dir = args.output or cfg.train.output_dir
        args.weights = on_main_process(lambda: find_weights(args.weights))
    if args.official:
        cfg.dataloader.evaluator.official = True
    if args.report and "box_proposals" in cfg.dataloader.evaluator.tasks:
        raise UserError("--report needs predicted classes, which box_proposals do not have")
    setup_datasets(cfg, training=False)


def run(args: argparse.Namespace, cfg: DictConfig) -> None:
    """What each process does."""
    if args.weights:
        model = instantiate(cfg.model).to(device_of(cfg)).eval()
        checkpointer = SafeCheckpointer(model)
        checkpointer.class_names = cfg.dataset.metadata.thing_classes
        checkpointer.load_strictly(args.weights)
        if not args.no_optimize:
            model = optimize_for_inference(model)
    elif comm.is_main_process():
        evaluator = evaluator_of(cfg, args.predictions)

    make_output_dir(cfg)
    output = Path(cfg.train.output_dir)
    for name in ("detectron2", "mask_rcnn_plugin"):
        setup_logger(str(output), distributed_rank=comm.get_rank(), name=name)
    log_processes(cfg)
    write = partial(write_report, folder=output / "report", threshold=args.confidence_threshold)
    if args.weights:
        config_args = [args.config, *args.overrides]
        results = evaluate(cfg, model, config_args, write if args.report else None)
        args.predictions = output / PREDICTIONS_FILE
    elif comm.is_main_process():
        results = evaluator.evaluate()
        write_results(output / "results.json", results, evaluator)
        if args.report and results:
            write(evaluator)
    if comm.is_main_process():
        report(args, cfg, results)


def report(args: argparse.Namespace, cfg: DictConfig, results: dict[str, Any]) -> None:
    """Print the results and what was written, and draw the pictures."""
    output = Path(cfg.train.output_dir)
    if results:
        # The paper's numbers are COCO's, and no measure of another dataset.
        row = None if cfg.dataset.test.json else row_of(base_name(cfg))
        print(results_table(results, row and row.scores))
        if row:
            print(f"paper: {row.summary()}")
        file = output / "results.json"
        print(f"computed by {json.loads(file.read_text())['evaluator']}")
        print(f"{file}: these numbers, and the AP of each category")
    print(f"{args.predictions}: predictions in COCO's format")
    if args.visualize:
        threshold = args.confidence_threshold
        (name,) = cfg.dataset.test.names
        pictures = draw_predictions(
            DatasetCatalog.get(name),
            MetadataCatalog.get(name),
            args.predictions,
            output / "pictures",
            args.visualize,
            0.5 if threshold is None else threshold,
        )
        print(f"{output / 'pictures'}: {len(pictures)} pictures, ground truth beside predictions")
    if args.report:
        page = f"{output / 'report' / 'index.html'}: open it to see what the model gets wrong"
        print(page if results else "no report: the test set has no annotations")


def main() -> None:
    run_program(parse_args(), prepare, run)


if __name__ == "__main__":
    main()
