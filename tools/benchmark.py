#!/usr/bin/env python
"""Measure the plugin beside detectron2 and torchvision: the same weights, the same work.

    python tools/benchmark.py                                   # all of it: half an hour on a CPU
    python tools/benchmark.py --stage model masks-to-rle --json benchmark.json
    python tools/benchmark.py --stage bf16 --trained output/demo

Mask R-CNN, ResNet-50-FPN, on an image of 800 x 1088 with 1000 proposals and 100 detections. Weights
are random, scaled so that activations, boxes and scores spread as a trained network's. detectron2
and torchvision are as they come, in float32; "detectron2 tuned" has what PyTorch offers anybody for
the row: channels-last, with autocast to bfloat16 or a compiled backbone where the row says so.

The peers take turns, A B A B. A time is the median over the rounds; a ratio is detectron2's time
over the plugin's, round by round: median and range. Memory is the most that a call holds beyond
what there was before it. How far the plugin's result is from detectron2's stands beside how far it
may be; a larger difference ends the run with exit code 1, after the table.

Prints Markdown; --json writes the same numbers to a file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
import mask_rcnn_plugin  # isort: split

import detectron2
import torch
import torchvision
from tabulate import tabulate

from benchmark.agreement import bf16_agreement
from benchmark.dataset_check import DATASET_SIZES, dataset_check
from benchmark.flops import measure_flops
from benchmark.growth import growth
from benchmark.made_up_detections import (
    made_up_ground_truth,
    made_up_predictions,
    process_memory,
    register_made_up,
)
from benchmark.stages import STAGES, Peers, Row
from benchmark.timing import interleave
from reproduce.runs import environment

PEERS = ("detectron2", "detectron2 tuned", "torchvision", "plugin")
EXTRAS = ("flops", "growth", "evaluation-memory", "dataset-check", "bf16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*STAGES, *EXTRAS]
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"some of {', '.join(names)}",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
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
        parser.error(f"--trained is {args.trained}, where there is no model_final.pth")
    return args


def measure(row: Row, rounds: int, device: str) -> dict[str, Any]:
    """A row's numbers: times in ms, memory in MiB."""
    measured = interleave(row.runs, rounds, device, row.is_long)
    stock, ours = measured["detectron2"], measured["plugin"]
    ratios = [a / b for a, b in zip(stock.ms, ours.ms)]
    difference = row.difference(ours.result, stock.result)
    return {
        "name": row.name,
        "ms": {name: round(m.median_ms, 2) for name, m in measured.items()},
        "ratio": round(median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "peak_mib": {name: m.peak_mib and round(m.peak_mib, 1) for name, m in measured.items()},
        "difference": difference,
        "difference_unit": row.unit,
        "allowed": row.allowed,
    }


def number(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1:
        return "< 1"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def stage_line(row: dict[str, Any]) -> list[str]:
    low, high = row["ratio_range"]
    allowed = "" if row["allowed"] is None else f" (allowed: {row['allowed']:.0e})"
    return [
        row["name"],
        *(number(row["ms"].get(peer)) for peer in PEERS),
        f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})",
        *(number(row["peak_mib"][peer]) for peer in ("detectron2", "plugin")),
        f"{row['difference']:.1e} {row['difference_unit']}{allowed}",
    ]


def to_markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    parts = [f"{report['environment']}, {report['versions']}\n\n`{report['command']}`"]
    if report["stages"]:
        headers = [
            "stage",
            *(f"{peer} ms" for peer in PEERS),
            "ratio",
            "detectron2 MiB",
            "plugin MiB",
            "difference",
        ]
        lines = [stage_line(row) for row in report["stages"]]
        parts.append(tabulate(lines, headers, "pipe", disable_numparse=True))
    if report.get("flops"):
        flops = report["flops"]
        counts = ", ".join(f"{name} {value:.0f}" for name, value in flops["total"].items())
        lines = [
            [
                *(peer, f"{achieved:.0f}", f"{achieved / flops['limit']:.0%}"),
                f"{flops['mask_share'][peer]:.0%}",
            ]
            for peer, achieved in flops["achieved"].items()
        ]
        headers = ["model", "GFLOP/s", "of the limit", "time in the mask branch"]
        parts.append(
            f"GFLOP: {counts}. Limit, a product of two 4096 x 4096 matrices: "
            f"{flops['limit']:.0f} GFLOP/s.\n\n"
            + tabulate(lines, headers, "pipe", disable_numparse=True)
        )
    if report.get("growth"):
        headers = ["what", "by", "number", "detectron2 ms", "plugin ms", "ratio"]
        lines = [
            [
                *(g["name"], g["quantity"], str(g["number"])),
                *(number(g["ms"][peer]) for peer in ("detectron2", "plugin")),
                f"{g['ms']['detectron2'] / g['ms']['plugin']:.2f}",
            ]
            for g in report["growth"]
        ]
        parts.append(tabulate(lines, headers, "pipe", disable_numparse=True))
    if report.get("evaluation_memory"):
        lines = [
            [str(m["images"]), number(m["rss_mb"]), f"{1000 * m['seconds'] / m['images']:.2g}"]
            for m in report["evaluation_memory"]
        ]
        headers = ["images of 100 detections evaluated", "memory grown by, MB", "ms an image"]
        parts.append(tabulate(lines, headers, "pipe", disable_numparse=True))
    if report.get("dataset_check"):
        lines = [
            [
                *(f"{m['images']:,}", f"{m['annotations']:,}", number(m["file_mb"])),
                *(f"{m['seconds']:.1f}", number(m["peak_mb"]), number(m["imports_mb"])),
            ]
            for m in report["dataset_check"]
        ]
        headers = [
            *("images, not opened", "annotations checked", "file, MB", "seconds"),
            *("peak memory, MB", "of it after the imports, MB"),
        ]
        parts.append(tabulate(lines, headers, "pipe", disable_numparse=True))
    if report.get("bf16"):
        bf16 = report["bf16"]
        parts.append(
            f"bf16 on a trained model: {bf16['found']:.1%} of the {bf16['boxes']} detections in "
            f"{bf16['images']} images are found again, of the same class and at IoU > 0.95."
        )
    return "\n\n".join(parts)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "command": " ".join(["python tools/benchmark.py", *sys.argv[1:]]),
        "environment": environment(),
        "versions": f"torchvision {torchvision.__version__}, detectron2 {detectron2.__version__}, "
        f"mask_rcnn_plugin {mask_rcnn_plugin.__version__}",
        "stages": [],
    }
    if set(args.stage) & {*STAGES, "flops"}:
        peers = Peers(args.device, tuple(args.size))
        for stage in filter(args.stage.__contains__, STAGES):
            for row in STAGES[stage](peers):
                progress(f"{row.name} ...")
                report["stages"].append(measure(row, args.rounds, args.device))
                progress(" | ".join(stage_line(report["stages"][-1])[1:]))
        if "flops" in args.stage:
            progress("FLOPs ...")
            report["flops"] = measure_flops(peers, args.rounds)._asdict()
        del peers
    if "growth" in args.stage:
        report["growth"] = []
        for name, quantity, count, runs in growth(args.device):
            progress(f"{name}, {count} {quantity} ...")
            measured = interleave(runs, max(args.rounds // 2, 1), args.device)
            ms = {peer: round(m.median_ms, 2) for peer, m in measured.items()}
            peaks = {peer: m.peak_mib for peer, m in measured.items()}
            report["growth"].append(
                {"name": name, "quantity": quantity, "number": count, "ms": ms, "peak_mib": peaks}
            )
    if "evaluation-memory" in args.stage:
        progress("memory of an evaluation ...")
        truth = made_up_ground_truth()
        with tempfile.TemporaryDirectory() as folder:
            dataset = register_made_up(Path(folder), truth)
            report["evaluation_memory"] = process_memory(
                dataset, made_up_predictions(truth), every=1000
            )
    if "dataset-check" in args.stage:
        report["dataset_check"] = []
        for images, annotations in DATASET_SIZES:
            progress(f"check of {images:,} images, {annotations:,} annotations ...")
            report["dataset_check"].append(dataset_check(images, annotations)._asdict())
    if "bf16" in args.stage:
        progress("bf16 on a trained model ...")
        report["bf16"] = bf16_agreement(args.trained, args.device)._asdict()
    return report


def main() -> None:
    args = parse_args()
    report = run(args)
    print(to_markdown(report))
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
