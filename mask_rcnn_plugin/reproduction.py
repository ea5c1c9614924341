"""Runs rows of the paper's tables: each a training by train.py in a process and folder of its own.

A folder bears a fingerprint of its config, so that rows that are equal are run once, a run
that is finished is never repeated, one that was interrupted goes on, and one whose config has
changed since is another run.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mask_rcnn_plugin.config import flatten, get_config
from mask_rcnn_plugin.paper import TASKS

# What each scale lays over a row.
SCALES = {"coco": "", "synthetic": "+ablation"}

_DONE = "run.json"  # written last


@dataclass(frozen=True)
class Run:
    """One training of one row.

    config: name with overlays.
    overrides: "key=value", without `train.output_dir`.
    seed: `train.seed`.
    max_iter: its iterations.
    folder: its `train.output_dir`.
    """

    config: str
    overrides: tuple[str, ...]
    seed: int
    max_iter: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / _DONE).exists()

    def iteration(self) -> int:
        """How many iterations are behind it, as metrics.json has it."""
        file = self.folder / "metrics.json"
        if not file.exists():
            return 0
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
            lines = stream.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):  # the last line may be half written
                return int(json.loads(line)["iteration"]) + 1
        return 0

    def results(self) -> dict[str, Any]:
        """results.json of a finished run."""
        return json.loads((self.folder / "results.json").read_text())

    def seconds(self) -> float:
        """Wall-clock time of a finished run, since it was last started."""
        return json.loads((self.folder / _DONE).read_text())["seconds"]


def plan(
    configs: Iterable[str], scale: str, seeds: int, root: Path, overrides: Sequence[str] = ()
) -> dict[tuple[str, int], Run]:
    """The runs that rows need.

    Args:
        configs: short names of rows.
        scale: key of `SCALES`.
        seeds: how many trainings a row, with `train.seed` 0, 1, ...
        root: folder of the runs' folders.
        overrides: "key=value", for all of them.

    Returns:
        {(config, seed): run}; rows whose configs are equal share a run.

    Raises:
        ConfigError: see `get_config`.
    """
    runs: dict[tuple[str, int], Run] = {}
    by_fingerprint: dict[str, Run] = {}
    for seed in range(seeds):
        for config in configs:
            name = config + SCALES[scale]
            changes = (*overrides, f"train.seed={seed}")
            cfg = get_config(name, changes)
            cfg.train.output_dir = ""
            content = json.dumps(flatten(cfg), sort_keys=True)
            key = hashlib.sha1(content.encode()).hexdigest()[:10]
            if key not in by_fingerprint:
                # Another table may have run it under another name.
                folder = next(
                    iter(sorted(root.glob(f"*-{key}"))),
                    root / f"{config.replace('/', '.')}-seed{seed}-{key}",
                )
                by_fingerprint[key] = Run(name, changes, seed, cfg.train.max_iter, folder)
            runs[config, seed] = by_fingerprint[key]
    return runs


def execute(runs: Iterable[Run], train_script: Path, *, jobs: int, num_gpus: int) -> list[Run]:
    """Train and evaluate what is not done, with a progress bar.

    Args:
        runs: in the order in which to start them.
        train_script: train.py.
        jobs: how many at a time; on a CPU they share its cores.
        num_gpus: of each run.

    Returns:
        Runs that failed; console.txt in their folder says why.
    """
    pending = deque(dict.fromkeys(run for run in runs if not run.done))
    running: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[Run] = []
    finished = 0  # iterations
    total = sum(run.max_iter for run in pending)
    with tqdm(total=total, unit="it", smoothing=0, disable=not pending) as bar:
        try:
            while pending or running:
                while pending and len(running) < jobs:
                    run = pending.popleft()
                    running[run] = (_start(run, train_script, jobs, num_gpus), time.monotonic())
                time.sleep(0.2)
                for run, (process, started) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    finished += run.max_iter
                    if process.returncode == 0 and (run.folder / "results.json").exists():
                        _finish(run, time.monotonic() - started)
                        bar.write(f"{run.config} seed {run.seed}: {_outcome(run)}")
                    else:
                        failed.append(run)
                        bar.write(
                            f"{run.config} seed {run.seed}: failed with exit code "
                            f"{process.returncode}, see {run.folder / 'console.txt'}"
                        )
                bar.n = finished + sum(run.iteration() for run in running)
                bar.set_postfix_str(f"{len(running)} running, {len(pending)} to come")
        finally:  # after an interruption nothing goes on in the background
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()
    return failed


def _start(run: Run, script: Path, jobs: int, num_gpus: int) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, str(script), "--config-file", run.config, "--resume"),
        *("--num-gpus", str(num_gpus)),
        *(*run.overrides, f"train.output_dir={run.folder}"),
    ]
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    with (run.folder / "console.txt").open("ab") as console:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=env
        )


def _finish(run: Run, seconds: float) -> None:
    content = {"config": run.config, "seed": run.seed, "seconds": round(seconds, 1)}
    partial = run.folder / f".{_DONE}"
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(run.folder / _DONE)


def _outcome(run: Run) -> str:
    results = run.results()
    scores = [f"{TASKS[t]} AP {results[t]['AP']:.1f}" for t in TASKS if t in results]
    return f"{', '.join(scores) or 'no annotations to score with'} in {run.seconds():.0f} s"
