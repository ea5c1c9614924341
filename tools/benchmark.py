#!/usr/bin/env python
"""Benchmark the plugin against detectron2 and torchvision: the same weights, the same work.

    python tools/benchmark.py --trained output/demo             # all of it: up to half an hour
    python tools/benchmark.py --stage model masks-to-rle --json benchmark.json
    python tools/benchmark.py --stage bf16 --trained output/demo

Mask R-CNN, ResNet-50-FPN, on an image of 800 x 1088 with 1000 proposals and 100 detections; a
training step is of two images of 512 x 512. Weights are random, scaled so that activations, boxes
and scores spread as a trained network's. detectron2 and torchvision run unmodified, in float32; a
training step of detectron2 is measured contiguous and channels-last, and the faster one counts.
"detectron2 tuned" uses what PyTorch itself offers for the row: channels-last, with autocast to
bfloat16 or a compiled backbone where the row says so.

The peers take turns, A B A B. A time is the median over the rounds; a ratio is detectron2's time
over the plugin's, round by round: median and range. Memory is a call's peak above what was held
before it. The difference of the plugin's result from detectron2's is shown next to its limit; a
larger one ends the run with exit code 1, after the table. Detections in bfloat16 are compared on a
trained model, --trained.

Prints Markdown; --json writes the same numbers to a file.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
import mask_rcnn_plugin  # noqa: F401

# isort: split

import detectron2
import torch
import torchvision

from benchmark import data, memory
from benchmark.agreement import bf16_agreement
from benchmark.counts import counts
from benchmark.report import stage_cells, to_markdown
from benchmark.stages import STAGES, Comparison, Peers
from benchmark.timing import interleave
from environment import environment

EXTRAS = ("counts", "evaluation-memory", "dataset-check", "loader", "startup", "bf16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*STAGES, *EXTRAS]
    some = f"some of {', '.join(names)}"
    parser.add_argument("--stage", nargs="+", choices=names, metavar="NAME", help=some)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there too")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--size", nargs=2, type=int, default=(800, 1088), metavar=("H", "W"), help="of the image"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--trained", metavar="DIR", type=Path, help="output of a training, for the stage bf16"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, must be 1 or more")
    if min(args.size) < 64:
        parser.error(f"--size is {args.size}, must be 64 or more each")
    if not args.stage:
        args.stage = [name for name in names if name != "bf16" or args.trained]
    if "bf16" in args.stage and not args.trained:
        parser.error("--stage bf16 needs --trained DIR, e.g. output/demo after `make demo`")
    if args.trained and not (args.trained / "model_final.pth").exists():
        parser.error(f"--trained is {args.trained}, which has no model_final.pth")
    return args


def measure(row: Comparison, rounds: int, device: str) -> dict[str, Any]:
    """A row's numbers: times in ms, memory in MiB."""
    measured = interleave(row.runs, rounds, device, row.once)
    baseline = None
    if other := measured.pop("detectron2 channels-last", None):
        baseline = "contiguous"
        if other.median_ms < measured["detectron2"].median_ms:
            measured["detectron2"], baseline = other, "channels-last"
    stock, ours = measured["detectron2"], measured["plugin"]
    ratios = [a / b for a, b in zip(stock.ms, ours.ms)]
    return {
        "name": row.name,
        "baseline": baseline,
        "ms": {name: round(m.median_ms, 2) for name, m in measured.items()},
        "ratio": round(median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "peak_mib": {name: m.peak_mib and round(m.peak_mib, 1) for name, m in measured.items()},
        "difference": row.difference(ours.result, stock.result),
        "difference_unit": row.unit,
        "allowed": row.allowed,
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "command": " ".join(["python tools/benchmark.py", *sys.argv[1:]]),
        "environment": environment(),
        "versions": f"torchvision {torchvision.__version__}, detectron2 {detectron2.__version__}",
        "stages": [],
    }
    if stages := [STAGES[name] for name in STAGES if name in args.stage]:
        peers = Peers(args.device, tuple(args.size))
        for row in (row for stage in stages for row in stage(peers)):
            progress(f"{row.name} ...")
            report["stages"].append(measure(row, args.rounds, args.device))
            progress(" | ".join(stage_cells(report["stages"][-1])[1:]))
        del peers
    if "evaluation-memory" in args.stage:
        progress("memory of an evaluation ...")
        report["evaluation_memory"] = memory.evaluation_memory()
    if "dataset-check" in args.stage:
        report["dataset_check"] = []
        for images, annotations in memory.DATASET_SIZES:
            progress(f"check of {images:,} images, {annotations:,} annotations ...")
            report["dataset_check"].append(memory.dataset_check(images, annotations))
    if "counts" in args.stage:
        progress("waits, copies and operators ...")
        report["counts"] = counts()
    if "loader" in args.stage:
        progress("images a second of a worker ...")
        report["loader"] = data.loader_speed(args.rounds)
    if "startup" in args.stage:
        progress("start on {:,} images, {:,} annotations ...".format(*data.COCO))
        report["startup"] = data.startup(*data.COCO)
    if "bf16" in args.stage:
        progress("bf16 on a trained model ...")
        report["bf16"] = bf16_agreement(args.trained, args.device)
    return report


def main() -> None:
    args = parse_args()
    report = run(args)
    print(to_markdown(report), end="")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    off = [
        row["name"]
        for row in report["stages"]
        if row["allowed"] is not None and not row["difference"] <= row["allowed"]
    ]
    if off:
        sys.exit(f"benchmark.py: results differ more than allowed: {', '.join(off)}")


if __name__ == "__main__":
    main()
