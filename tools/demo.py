#!/usr/bin/env python
"""Mask R-CNN from nothing to pictures, in minutes: `make demo`.

Draws a dataset of people and shapes, trains boxes, masks and keypoints on it from random weights,
evaluates on images that were held out, draws the predictions and, last, finds what is in a picture
of its own. Everything it does is

    python train.py --config-file table5_multitask/keypoint_and_mask+ablation ...
    python eval.py --config-file table5_multitask/keypoint_and_mask+ablation --visualize 8 ...
    python tools/predict.py --weights output/demo --input output/demo/photo.jpg

on all that is drawn, not the people alone, in one process with a progress bar, on one thread unless
OMP_NUM_THREADS says otherwise: beside other work, threads that wait for each other are many times
slower. A new run replaces the last one's output/demo, with --quick output/demo_quick; the drawn
images are used again. Ctrl-C saves what is trained, and --resume goes on from there.
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config, load  # isort: split

import cv2
import numpy as np
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from mask_rcnn_plugin.data.synthetic import draw_sample
from mask_rcnn_plugin.errors import mistakes_in_one_line
from mask_rcnn_plugin.evaluation import PREDICTIONS_FILE, results_table
from mask_rcnn_plugin.evaluation.pictures import draw_predictions
from mask_rcnn_plugin.training import setup_datasets

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of train.py
from train import do_train

CONFIG = "table5_multitask/keypoint_and_mask+ablation"
PICTURES = 8
QUICK = ["train.max_iter=40", "dataset.synthetic.train=64", "dataset.synthetic.val=16"]


class ProgressBar(HookBase):
    """Iterations done, time left and the loss on one line of the terminal."""

    def before_train(self) -> None:
        self._bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, desc="training", unit="it"
        )

    def after_step(self) -> None:
        loss = self.trainer.storage.history("total_loss").median(20)
        self._bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
        self._bar.update()
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._bar.close()


def log_to_file(output: Path) -> None:
    """The whole log to log.txt; to the terminal only how far the evaluation is."""
    for name in ("detectron2", "fvcore", "mask_rcnn_plugin"):
        logger = setup_logger(str(output), name=name)
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                logger.removeHandler(handler)
    evaluation = logging.getLogger("detectron2.evaluation.evaluator")
    evaluation.addHandler(logging.StreamHandler())
    evaluation.addFilter(lambda record: "done" in record.msg or "Start" in record.msg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few iterations: it runs, but learns nothing"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a demo that was stopped")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()

    start = time.perf_counter()
    output = Path("output/demo_quick" if args.quick else "output/demo")
    overrides = [
        f"train.output_dir={output}",
        f"train.seed={args.seed}",
        "dataloader.train.dataset.min_keypoints=0",
        # Short: five minutes on one core.
        "dataset.synthetic.val=200",
        "train.max_iter=1200",
    ]
    if args.quick:
        overrides += QUICK
    cfg = get_config(CONFIG, overrides)
    print(
        f"Draws {cfg.dataset.synthetic.train + cfg.dataset.synthetic.val} images of people and "
        f"shapes, trains {cfg.train.max_iter} iterations, evaluates and predicts. Writes to "
        f"{output}{'' if args.quick else ', in about five minutes, longer on a busy machine'}.",
        flush=True,
    )
    for split, name in ((cfg.dataset.train, "train"), (cfg.dataset.test, "val")):
        split.json = f"{cfg.dataset.synthetic.root}/{name}.json"  # not the people alone
    with mistakes_in_one_line():  # e.g. images of an earlier version of the drawing
        setup_datasets(cfg)
    if not args.resume:
        shutil.rmtree(output, ignore_errors=True)
    log_to_file(output)
    seed_all_rng(args.seed)
    # Ctrl-C ends a training as SIGTERM does: it saves first.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            results = do_train(cfg, resume=args.resume, extra_hooks=[ProgressBar()])
    except SystemExit:
        print(
            "\nStopped and saved. The same command with --resume continues, e.g. make demo "
            "DEMO_ARGS=--resume; without it starts over.",
            file=sys.stderr,
        )
        raise
    LazyConfig.save(cfg, str(output / "config.yaml"))
    (name,) = cfg.dataset.test.names
    pictures = draw_predictions(
        DatasetCatalog.get(name),
        MetadataCatalog.get(name),
        output / PREDICTIONS_FILE,
        output / "pictures",
        PICTURES,
    )

    photo = output / "photo.jpg"
    cv2.imwrite(str(photo), draw_sample(np.random.default_rng(5), 192)[0])
    result = load(output)(photo)
    result.save(output / "photo_found.jpg")
    found = ", ".join(result.above(0.5).names) or "nothing"

    print(f"\nOn {cfg.dataset.synthetic.val} held-out images (AP in points, COCO's metrics):\n")
    print(results_table(results))
    print(f"\n{output}/results.json             these numbers, and the AP of each category")
    print(f"{output}/pictures/                {len(pictures)} pictures: truth, prediction")
    print(f"tensorboard --logdir {output}     the losses")
    print(f"{output}/photo_found.jpg          one more picture: {found}")
    print("\nTo predict on a picture (this model knows drawn people and shapes only):\n")
    print(f"    python tools/predict.py --weights {output} --input {photo}")
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
