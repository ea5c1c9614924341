#!/usr/bin/env python
"""Train on microscope images of nuclei, and write what docs/real_images.md says of it.

    MASK_RCNN_NUCLEI_SAMPLE=my/nuclei python tools/real_images.py

The folder holds train.json, val.json and images/. Writes to output/real_images: runs/ (one folder
per training), the page real_images.md, what it is made from in real_images/, and for each seed of
the first model report/ and pictures/. Finished runs are not repeated: give the same command again.
"""

import argparse
import csv
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mask_rcnn_plugin.errors import mistakes_in_one_line
from mask_rcnn_plugin.evaluation import PREDICTIONS_FILE
from mask_rcnn_plugin.evaluation.pictures import draw_predictions
from mask_rcnn_plugin.evaluation.report import write_report
from mask_rcnn_plugin.evaluation.testing import evaluator_of
from mask_rcnn_plugin.training import setup_datasets
from reproduce import nuclei
from reproduce.runs import Run, check_counts, execute, plan
from update_docs import replace_blocks

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = "MASK_RCNN_NUCLEI_SAMPLE"
SIDE = 3  # images of a montage, each way
LIMITS = ((100, 500), (1000, 500), (1000, 2000))  # detections and proposals in a montage


def write_montages(truth: COCO, images: Path, folder: Path) -> None:
    """Put images of a size together, `SIDE` x `SIDE`, as a dataset of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    by_size: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for image in truth.imgs.values():
        by_size.setdefault((image["height"], image["width"]), []).append(image)
    montages: list[dict[str, Any]] = []
    annotations = []
    for (height, width), alike in by_size.items():
        for first in range(0, len(alike) - SIDE**2 + 1, SIDE**2):
            number = len(montages) + 1
            pixels = np.zeros((SIDE * height, SIDE * width, 3), np.uint8)
            for place, image in enumerate(alike[first : first + SIDE**2]):
                y, x = place // SIDE * height, place % SIDE * width
                there = np.s_[y : y + height, x : x + width]
                pixels[there] = cv2.imread(str(images / image["file_name"]))
                for old in truth.imgToAnns[image["id"]]:
                    mask = np.zeros(pixels.shape[:2], np.uint8, order="F")
                    mask[there] = truth.annToMask(old)
                    rle = coco_mask.encode(mask)
                    rle["counts"] = rle["counts"].decode()
                    box = np.add(old["bbox"], (x, y, 0, 0)).tolist()
                    new = {"image_id": number, "bbox": box, "segmentation": rle}
                    annotations.append({**old, **new})
            cv2.imwrite(str(folder / f"{number}.png"), pixels)
            size = {"height": SIDE * height, "width": SIDE * width}
            montages.append({"id": number, "file_name": f"{number}.png", **size})
    content = {**truth.dataset, "images": montages, "annotations": annotations}
    (folder / "val.json").write_text(json.dumps(content))


def report_errors(run: Run, folder: Path) -> dict[str, Any]:
    """Write the report on a run's predictions, and pictures; counts of the mistakes by size."""
    cfg = get_config(run.config, run.overrides)
    setup_datasets(cfg, training=False)
    predictions = run.folder / PREDICTIONS_FILE
    evaluator = evaluator_of(cfg, predictions)
    evaluator.evaluate()
    write_report(evaluator, folder / "report")
    (name,) = cfg.dataset.test.names
    images, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    draw_predictions(images, metadata, predictions, folder / "pictures", len(images))
    with (folder / "report" / "mistakes.csv").open() as file:
        return nuclei.errors(evaluator.coco, list(csv.DictReader(file)))


def numbers(runs: list[Run]) -> list[dict[str, Any]]:
    """results.json of each run, without the dataset's name, which is a path."""
    return [{k: v for k, v in run.results().items() if k != "dataset"} for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each model")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--output", type=Path, default=Path("output/real_images"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to every config")
    args = parser.parse_intermixed_args()
    check_counts(parser, args, "seeds", "jobs")
    if not os.environ.get(SAMPLE):
        parser.error(f"{SAMPLE} is not set, must be a folder of train.json, val.json and images/")
    sample, output = Path(os.environ[SAMPLE]).resolve(), args.output
    data = [
        f"dataset.{split}.{key}={sample / file}"
        for split, name in (("train", "train.json"), ("test", "val.json"))
        for key, file in (("json", name), ("images", "images"))
    ]
    runs: dict[str, list[Run]] = {}
    with mistakes_in_one_line():
        for name, (config, changes) in nuclei.MODELS.items():
            given = [*data, *changes, *args.overrides]
            runs[name] = [
                *plan([f"{config}+nuclei"], "coco", args.seeds, output / "runs", given).values()
            ]
            setup_datasets(get_config(runs[name][0].config, given))
    first, *_ = runs.values()

    sets = {name: COCO(sample / f"{name}.json") for name in ("train", "val")}
    montages = output / "montages"
    write_montages(sets["val"], sample / "images", montages)
    sets["montages"] = COCO(montages / "val.json")
    if not sets["montages"].imgs:
        parser.error(
            f"{sample / 'val.json'} has {len(sets['val'].imgs)} images, must have {SIDE**2} of one "
            "size, to make a montage"
        )
    described = {name: nuclei.describe(coco) for name, coco in sets.items()}
    resize = get_config(first[0].config, first[0].overrides).dataloader.test.mapper.augmentations[0]
    large = [
        f"dataloader.test.mapper.augmentations.0.{key}={SIDE * resize[key]}"
        for key in ("short_edge_length", "max_size")
    ]
    large += [f"dataset.test.json={montages / 'val.json'}", f"dataset.test.images={montages}"]
    tests: dict[tuple[int, int], list[Run]] = {}
    for detections, proposals in LIMITS:
        changes = [*large, f"dataset.test.max_detections={detections}"]
        changes.append(f"model.proposal_generator.post_nms_topk=[300,{proposals}]")
        tests[detections, proposals] = [
            replace(
                run, overrides=(*run.overrides, *changes), trained=run,
                folder=run.folder / f"montages-{detections}-{proposals}",
            )
            for run in first
        ]  # fmt: skip
    wanted = [run for runs_of_seed in zip(*runs.values()) for run in runs_of_seed]
    wanted += [run for runs_of_test in tests.values() for run in runs_of_test]
    if failed := execute(wanted, REPOSITORY, jobs=args.jobs, num_gpus=1):
        sys.exit(f"real_images.py: {len(failed)} runs failed, see above")

    content = {
        "command": shlex.join(["python", "tools/real_images.py", *sys.argv[1:]]),
        "seeds": args.seeds,
        "jobs": args.jobs,
        "minutes": round(sum(run.seconds() for run in wanted) / 60),
        "environment": " and on ".join(sorted({run.environment() for run in wanted})),
        "data": described,
        "models": {
            name: {
                "results": numbers(of_model),
                "minutes": [round(run.seconds() / 60, 2) for run in of_model],
                "curves": [
                    nuclei.curve(run.folder / "metrics.json", run.max_iter) for run in of_model
                ],
            }
            for name, of_model in runs.items()
        },
        "many": [{"limits": limits, "results": numbers(of)} for limits, of in tests.items()],
        "errors": [report_errors(run, output / f"seed{run.seed}") for run in first],
    }
    data_of_page = output / "real_images"
    data_of_page.mkdir(exist_ok=True)
    (data_of_page / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    nuclei.plot_curves(content, data_of_page / "curves.png")
    page = (REPOSITORY / "docs" / "real_images.md").read_text()
    (output / "real_images.md").write_text(replace_blocks(page, nuclei.blocks(content)))
    print(f"{output / 'real_images.md'}: the page; {output / 'seed0'}: report and pictures")


if __name__ == "__main__":
    main()
