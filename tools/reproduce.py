#!/usr/bin/env python
"""Train and evaluate the rows of the paper's tables, and set them beside the paper.

    python tools/reproduce.py --table 2c --scale synthetic --seeds 3
    python tools/reproduce.py --table 2c --scale coco --num-gpus 8
    python tools/reproduce.py --table all --scale synthetic --seeds 3

`--scale coco` trains the configs as they are. `--scale synthetic` trains them with the overlay
"ablation", in minutes a row on a CPU core, on drawn images: it asks which way an effect goes, not
how large it is on COCO.

Finished runs are not repeated, and interrupted ones continue from their last checkpoint: give the
same command again. Rows of one command that differ only in their test set are trained once, e.g.
with --table 1 --table 2a.

Writes to output/reproduce/SCALE: runs/ (one folder per training), and for each table TABLE.json,
TABLE.md, TABLE.png (the paper's effects and ours) and TABLE_pictures.jpg (the same images under
each row). index.md has all tables in the folder, also those of earlier commands, on one page.
"""

import argparse
import json
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_rcnn_plugin.config.paper import TABLES, rows_of
from mask_rcnn_plugin.errors import ConfigError, mistakes_in_one_line
from mask_rcnn_plugin.evaluation import PREDICTIONS_FILE
from mask_rcnn_plugin.evaluation.pictures import draw_prediction, draw_truth
from mask_rcnn_plugin.evaluation.predictions import read_predictions
from mask_rcnn_plugin.training import setup_datasets
from reproduce import report
from reproduce.runs import SCALES, Run, check_counts, execute, plan

SCRIPTS = Path(__file__).resolve().parents[1]  # of train.py and eval.py
# What "all" means. At the synthetic scale a row keeps its heads, layers and losses, so what
# compares these can be asked; backbones shrink and other people's systems are not there.
ALL = {
    "coco": list(TABLES),
    "synthetic": ["2b", "class_agnostic", "2c", "2d", "fpn_roi_layer", "2e", "5", "6"],
}
PICTURES = 2  # images drawn under each row
PICTURE_SCORE = 0.3  # a prediction below it is not drawn

Runs = dict[tuple[str, int], Run]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", action="append", required=True, choices=[*TABLES, "all"],
        metavar="TABLE", help=f"one of {', '.join(TABLES)}, or all; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--row", action="append", metavar="CONFIG",
        help="run only this row of the tables, by its config, e.g. table2c_roi_layer/roialign_ave; "
        "may be given several times; rows run before, with as many seeds, stay in the table",
    )  # fmt: skip
    parser.add_argument("--scale", choices=list(SCALES), default="synthetic")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: output/reproduce/SCALE"
    )
    parser.add_argument(
        "--jobs", type=int, help="trainings at a time, on the same GPUs if there are any; default: "
        "one a core at the synthetic scale on a CPU, else 1",
    )  # fmt: skip
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to every config")
    args = parser.parse_intermixed_args()
    check_counts(parser, args, "seeds", "jobs", "num_gpus")
    if args.jobs is None:
        alone = args.scale == "coco" or torch.cuda.is_available()
        alone = alone or "timing" in args.table  # beside others a model cannot be timed
        args.jobs = 1 if alone else len(os.sched_getaffinity(0))
    args.output = args.output or Path("output/reproduce") / args.scale
    args.tables = ALL[args.scale] if "all" in args.table else args.table
    rows = list(dict.fromkeys(r.config for t in args.tables for r in rows_of(t) if r.config))
    if unknown := [row for row in args.row or () if row not in rows]:
        parser.error(f"--row is {unknown[0]!r}, must be one of {', '.join(rows)}")
    args.every, args.rows = rows, args.row or rows
    return args


def write_table(table: str, args: argparse.Namespace, runs: Runs) -> None:
    """Write a table's files."""
    rows, output = [], args.output
    drawn: dict[str, Run] = {}
    for row in rows_of(table):
        of_seeds = [run for (config, _), run in runs.items() if config == row.config]
        if not all(run.done for run in of_seeds):
            of_seeds = []
        if of_seeds:
            drawn[row.config] = of_seeds[0]
        rows.append(
            {
                "name": row.name,
                "config": row.config,
                "split": row.split,
                "paper": dict(row.scores),
                "results": [run.results() for run in of_seeds] or None,
                "iterations": of_seeds[0].max_iter if of_seeds else None,
                "minutes": [round(run.seconds() / 60, 2) for run in of_seeds],
            }
        )
    done = {run for run in runs.values() if run.done}
    content = {
        "table": table,
        "scale": args.scale,
        "seeds": args.seeds,
        "command": shlex.join(["python", "tools/reproduce.py", *sys.argv[1:]]),
        "jobs": args.jobs,
        "environment": " and on ".join(sorted({run.environment() for run in done})),
        "rows": rows,
    }
    (output / f"{table}.json").write_text(json.dumps(content, indent=2) + "\n")
    (output / f"{table}.md").write_text(report.table_page(content))
    report.plot_effects(content, output / f"{table}.png")
    if drawn:
        draw_rows(table, drawn, output / f"{table}_pictures.jpg")


def draw_rows(table: str, runs: dict[str, Run], file: Path) -> None:
    """Draw a few test images: their ground truth, then each row's predictions."""
    some = next(iter(runs.values()))
    cfg = get_config(some.config, some.overrides)
    setup_datasets(cfg, training=False)
    (name,) = cfg.dataset.test.names
    metadata = MetadataCatalog.get(name)
    images = DatasetCatalog.get(name)
    # With enough to compare and little enough to see it. Test-dev has no annotations.
    images = [i for i in images if len(i.get("annotations", [])) in (2, 3)] or images
    predictions = {
        config: read_predictions(run.folder / PREDICTIONS_FILE, PICTURE_SCORE)
        for config, run in runs.items()
    }
    names = {row.config: row.name for row in rows_of(table)}
    pictures = {}
    for number, image in enumerate(images[:PICTURES], start=1):
        pictures[f"image {number}, ground truth"] = draw_truth(image, metadata)
        for config, found in predictions.items():
            drawn = draw_prediction(image, found[image["image_id"]], metadata)
            pictures[f"image {number}, {names[config]}"] = drawn
    report.plot_predictions(pictures, file, columns=len(runs) + 1)


def main() -> None:
    args = parse_args()
    with mistakes_in_one_line():
        place = (args.scale, args.seeds, args.output / "runs", args.overrides)
        runs = plan(args.rows, *place)
        wanted = list(dict.fromkeys(runs.values()))
        for run in wanted:  # is every dataset there? Draws what is to be drawn
            if not run.done:
                setup_datasets(get_config(run.config, run.overrides))
    done = sum(run.done for run in wanted)
    print(f"{len(wanted)} trainings for {len(args.rows)} rows, {done} of them done", flush=True)
    failed = execute(wanted, SCRIPTS, jobs=args.jobs, num_gpus=args.num_gpus)
    for row in args.every:  # others may have been run before
        if row not in args.rows:
            with suppress(ConfigError):  # of an override that the chosen rows alone have
                runs |= plan([row], *place)

    args.output.mkdir(parents=True, exist_ok=True)
    for table in args.tables:
        write_table(table, args, runs)
        print(f"\n{(args.output / f'{table}.md').read_text()}")
    (args.output / "index.md").write_text(report.index_page(report.read_tables(args.output)))
    print(f"{args.output / 'index.md'}: all tables on one page")
    if failed:
        sys.exit(f"reproduce.py: {len(failed)} trainings failed, see above")


if __name__ == "__main__":
    main()
