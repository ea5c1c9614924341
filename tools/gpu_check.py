#!/usr/bin/env python
"""What only a GPU can tell, in ten minutes: `make gpu-check`, see docs/gpu.md.

    python tools/gpu_check.py
    python tools/gpu_check.py --device cpu --size 128 128 --minutes 2     # a dry run

Runs the tests marked `cuda`, measures training and inference of detectron2, of the plugin, and of
the plugin without each of its parts, and counts waits of the host, by the rules and by what CUDA
reports. Writes docs/benchmarks/NAME_OF_THE_GPU.json and .md, anew after each measurement, so that
a run that is cut off leaves what it has found. Exit code 1 if a test or a measurement failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
import mask_rcnn_plugin  # noqa: F401

# isort: split

import detectron2
import torch
import torchvision

from benchmark import gpu
from benchmark.counts import IMAGES, counts
from benchmark.report import to_markdown
from environment import environment

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS_MINUTES = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument(
        "--size", nargs=2, type=int, default=(800, 1088), metavar=("H", "W"), help="of the images"
    )
    parser.add_argument(
        "--minutes", type=float, default=4, help="for the measurements, tests aside (default: 4)"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument(
        "--folder", type=Path, help="of the page (default: docs/benchmarks; output for a dry run)"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; --device cpu is a dry run")
    if min(args.size) < 64:
        parser.error(f"--size is {args.size}, must be 64 or more each")
    if args.folder is None:
        args.folder = REPOSITORY / ("docs/benchmarks" if args.device == "cuda" else "output")
    args.folder = args.folder.resolve()
    return args


def run_tests(tests: Path, folder: Path) -> dict[str, Any]:
    """The tests marked `cuda` below a folder, in one process.

    Returns:
        "counts" of tests by outcome, and names of the "failed" ones.
    """
    # Only their files: others may import what a bare machine lacks.
    files = [f for f in sorted(tests.rglob("test_*.py")) if "mark.cuda" in f.read_text()]
    results = folder / "tests.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", f"--junitxml={results}", "-p"]
    command += ["no:cacheprovider", "-o", "junit_family=xunit1", *map(str, files)]
    path = [str(REPOSITORY), str(REPOSITORY / "tools"), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    running = subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | env, start_new_session=True
    )
    try:
        running.wait(60 * TESTS_MINUTES)
    except subprocess.TimeoutExpired:
        return {"counts": {"finished": 0}, "failed": [f"not done in {TESTS_MINUTES} minutes"]}
    finally:  # whatever a test has started, which may wait on the GPU
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    if not results.exists():
        return {"counts": {"finished": 0}, "failed": ["pytest did not start, see above"]}
    cases = list(ElementTree.parse(results).iter("testcase"))
    results.unlink()
    bad = [c for c in cases if any(c.find(kind) is not None for kind in ("failure", "error"))]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(bad) - skipped
    return {
        "counts": {"passed": passed, "failed": len(bad), "skipped": skipped},
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in bad],
    }


def main() -> None:
    args, begun = parse_args(), time.monotonic()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "gpu_check_dry_run"
    page = args.folder / re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"size": list(args.size), "images": IMAGES, "rows": []}
    report: dict[str, Any] = {
        "command": " ".join(["python tools/gpu_check.py", *sys.argv[1:]]),
        "environment": environment(),
        "versions": f"torchvision {torchvision.__version__}, detectron2 {detectron2.__version__}",
        "gpu": found,
    }

    def write() -> None:
        page.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        page.with_suffix(".md").write_text(to_markdown(report))

    if not args.no_tests:
        found["tests"] = run_tests(REPOSITORY / "tests", args.folder)
        write()
    seen: list[dict[str, Any]] = []
    failed: list[str] = list(found.get("tests", {}).get("failed", []))
    if args.device == "cuda":
        try:
            seen = gpu.waits()
        except Exception as error:  # the measurements are worth more
            failed.append(f"waits that CUDA reports: {type(error).__name__}: {error}")
    for rows in gpu.measured(args.device, tuple(args.size), args.minutes):
        found["rows"] = rows
        write()
        print(f"{len(rows)} variants, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    of_name = {row["name"]: row for row in seen}
    found["waits"] = [row | of_name.get(row["name"], {}) for row in counts()]
    write()
    print(to_markdown(report), end="")
    failed += [
        f"{row['what']} of {row['variant']}, {row['model']}, {row['precision']}: {row['error']}"
        for row in found["rows"]
        if not row.get("error", "not run").startswith("not run")
    ]
    print(f"written: {page.with_suffix('.md')}", file=sys.stderr)
    if failed:
        sys.exit("gpu_check.py: failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
