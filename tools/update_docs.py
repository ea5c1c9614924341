#!/usr/bin/env python
"""Write what docs/ takes from data: tables, numbers, whole pages.

    python tools/update_docs.py            # after a benchmark, a reproduction, a change of a row
    python tools/update_docs.py --check    # writes nothing; exit code 1 if something is out of date

The data are the paper's numbers, docs/benchmarks/*.json, the JSON files of docs/reproduction and
docs/real_images/results.json. To publish a reproduction, first copy its .json, .png and .jpg files
to docs/reproduction, or to a folder in it. In README.md, docs/paper.md, docs/real_images.md,
docs/scaling.md and docs/speed.md the text between `<!-- begin NAME -->` and `<!-- end NAME -->` is
replaced.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
import mask_rcnn_plugin  # noqa: F401  # isort: split
from benchmark import report as benchmark
from mask_rcnn_plugin.config.paper import ROWS, TABLES, TASKS, Row
from reproduce import nuclei
from reproduce import report as reproduction
from reproduce.claims import CLAIMS

REPOSITORY = Path(__file__).resolve().parents[1]
BENCHMARKS = Path("docs/benchmarks")
REPRODUCTION = Path("docs/reproduction")


def generate(root: Path = REPOSITORY) -> dict[Path, str]:
    """Contents of all files that are made of data, by path below `root`."""
    pages = {
        BENCHMARKS / f"{file.stem}.md": benchmark.to_markdown(_read(file))
        for file in sorted((root / BENCHMARKS).glob("*.json"))
    }
    folders = sorted({file.parent for file in (root / REPRODUCTION).rglob("*.json")})
    reproductions = {f.relative_to(root): reproduction.read_tables(f) for f in folders}
    for place, tables in reproductions.items():
        pages[place / "index.md"] = reproduction.index_page(tables)
        pages |= {place / f"{t['table']}.md": reproduction.table_page(t) for t in tables}
    contents = {c["table"]: c for c in reproductions[REPRODUCTION]}
    counts = _read(root / BENCHMARKS / "counts.json")["counts"]
    cpu, data = (_read(root / BENCHMARKS / f"{name}.json") for name in ("cpu", "data"))
    blocks = {
        Path("README.md"): {
            "claims": f"{claims_line(contents)} [All of them](docs/reproduction/index.md).",
            "speed": speed_line(cpu),
        },
        Path("docs/paper.md"): {
            "paper": paper_table(),
            "reproduction": reproduction_block(contents),
        },
        Path("docs/real_images.md"): nuclei.blocks(_read(root / "docs/real_images/results.json")),
        Path("docs/scaling.md"): {
            "launching": benchmark.launching_table(counts),
            "startup": startup_line(data),
            "workers": workers_line(data),
        },
        Path("docs/speed.md"): {
            "benchmark": benchmark_block(cpu),
            "counts": benchmark.counts_table(counts),
            "loader": loader_line(data),
            "dataset-check": dataset_check_line(_read(root / BENCHMARKS / "dataset_check.json")),
        },
    }
    for page, of_page in blocks.items():
        pages[page] = replace_blocks((root / page).read_text(), of_page)
    return pages


def replace_blocks(text: str, blocks: dict[str, str]) -> str:
    """
    Raises:
        ValueError: if the text doesn't have exactly one place for each block.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the block {name!r} must have one begin and one end")
        before, rest = text.split(begin)
        text = f"{before}{begin}{block}\n{end}{rest.split(end)[1]}"
    return text


def paper_table() -> str:
    """The rows that have a config."""
    lines = [
        [f"`{row.config}`", f"{TABLES[row.table].place}, {row.name}", paper_cell(row)]
        for row in ROWS
        if row.config
    ]
    return benchmark.table(["config", "row", "paper (AP)"], lines)


def paper_cell(row: Row) -> str:
    """Its APs, or what else the paper says of it."""
    numbers = [f"{TASKS[task]} {metrics['AP']:.1f}" for task, metrics in row.scores.items()]
    if numbers:
        return f"{', '.join(numbers)} ({row.split})"
    return f"{row.milliseconds} ms" if row.milliseconds else row.note


def benchmark_block(report: dict[str, Any]) -> str:
    parts = [f"On {report['environment']}:", benchmark.summary(report)]
    if report.get("bf16"):
        parts.append(f"In bf16 {benchmark.agreement(report['bf16'])}.")
    return "\n\n".join(parts)


def speed_line(report: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in report["stages"]}
    model, step = rows["whole model"], rows["training step"]
    return (
        f"On a CPU, in float32, detectron2 takes {model['ratio']:.1f} times as long as the plugin "
        f"for an image of 800 x 1088 pixels, and {step['ratio']:.1f} times as long for a training "
        f"step on two images of 512 x 512 (plugin: {step['ms']['plugin'] / 1000:.1f} s). Mask "
        f"R-CNN, ResNet-50-FPN, measured on {report['environment']} ([all "
        "numbers](docs/benchmarks/cpu.md))."
    )


def dataset_check_line(report: dict[str, Any]) -> str:
    largest = report["dataset_check"][-1]
    return (
        f"Checked without opening images, on {report['environment']}: {largest['images']:,} images "
        f"with {largest['annotations']:,} annotations, a file of {largest['file_mb']:.0f} MB, in "
        f"{largest['seconds']:.0f} s and {largest['grown_mb']:.0f} MB of memory beyond the imports "
        "([measured](benchmarks/dataset_check.md))."
    )


def loader_line(report: dict[str, Any]) -> str:
    speeds, ratios = report["loader"]["images_per_second"], report["loader"]["ratio"]
    opencv = "plugin, resize=opencv"
    return (
        f"A core prepares {speeds['plugin']:.0f} images of 640 x 480 a second, "
        f"{ratios['plugin']:.2f} times as many as with detectron2's loader, and "
        f"{speeds[opencv]:.0f}, {ratios[opencv]:.1f} times as many, with OpenCV. Measured on "
        f"{report['environment']} ([all numbers](benchmarks/data.md))."
    )


def startup_line(report: dict[str, Any]) -> str:
    seconds, peaks = report["startup"]["seconds"], report["startup"]["peak_mib"]
    door = sum(seconds["plugin"].values()) - seconds["plugin"]["check"]
    return (
        f"Of {report['startup']['images']:,} images with {report['startup']['annotations']:,} "
        f"annotations, that takes {door:.0f} s of a CPU core (detectron2 "
        f"{sum(seconds['detectron2'].values()):.0f} s) and at most {peaks['plugin'] / 1024:.1f} "
        f"GiB ({peaks['detectron2'] / 1024:.1f}). "
        f"8 processes need {8 * peaks['plugin'] / 1024:.0f} GiB of a node's memory then. The "
        f"check, the main process's alone, takes {seconds['plugin']['check']:.0f} s more. Measured "
        f"on {report['environment']} ([all numbers](benchmarks/data.md))."
    )


def workers_line(report: dict[str, Any]) -> str:
    """How fast a GPU may be for four workers to suffice; 0.261 s a step of 2 images on a V100."""
    speeds = report["loader"]["images_per_second"]
    rate = 2 / 0.261
    return (
        f"A core prepares {speeds['plugin']:.0f} images a second with Pillow and "
        f"{speeds['plugin, resize=opencv']:.0f} with `dataloader.train.mapper.resize=opencv`, "
        f"measured there; a V100 takes 2 / 0.261 = {rate:.1f}: four workers on a core each suffice "
        f"until the GPU is 4 x {speeds['plugin']:.0f} / {rate:.1f} = "
        f"{4 * round(speeds['plugin']) / rate:.0f} times as fast."
    )


def reproduction_block(contents: dict[str, Any]) -> str:
    """What was run, Table 2c's mask AP, and how many claims are seen."""
    rows = contents["2c"]["rows"]
    ours = [reproduction.spread(reproduction.collect(r["results"])["segm"]["AP"]) for r in rows]
    lines = [
        ["paper", *(f"{row['paper']['segm']['AP']:.1f}" for row in rows)],
        ["drawn images", *ours],
    ]
    table = benchmark.table(["Table 2c", *(row["name"] for row in rows)], lines)
    minutes, seeds = reproduction.minutes_of([*contents.values()]), contents["2c"]["seeds"]
    return (
        f"Mask AP [over {seeds} seeds](reproduction/index.md), mean ± deviation, beside the "
        f"paper's on COCO:\n\n{table}\n\n{claims_line(contents)} All {len(minutes)} trainings "
        f"took {sum(minutes) / 60:.0f} hours of one core."
    )


def claims_line(contents: dict[str, Any]) -> str:
    """How many claims of the paper are seen."""
    measured = reproduction.measured_in(*contents.values())
    verdicts = Counter(claim.verdict(measured) for claim in CLAIMS)
    return (
        f"Of {len(CLAIMS)} claims of the paper, trainings on drawn images show "
        f"{verdicts['agrees']}, contradict {verdicts['disagrees']} and leave "
        f"{verdicts['undecided']} undecided."
    )


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    changed = {
        path: text
        for path, text in generate().items()
        if not (REPOSITORY / path).exists() or (REPOSITORY / path).read_text() != text
    }
    if args.check and changed:
        sys.exit(f"out of date: {', '.join(map(str, changed))}; run python tools/update_docs.py")
    for path, text in changed.items():
        (REPOSITORY / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
