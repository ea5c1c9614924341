"""Runs rows of the paper's tables: each by train.py, in a process and folder of its own.

A folder's name has a fingerprint of its config: equal rows are run once, finished runs are never
repeated, interrupted ones continue from their last checkpoint, and a changed config is another run.
Rows of one plan that differ only in their test set are trained once, and tested by eval.py.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from environment import environment
from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.config import deciding, get_config
from mask_rcnn_plugin.config.paper import TASKS
from mask_rcnn_plugin.data import synthetic
from mask_rcnn_plugin.training.machine import precision

# What each scale lays over a row.
SCALES = {"coco": "", "synthetic": "+ablation"}

_DONE = "run.json"  # written last
_SECONDS = "seconds"  # a line a start
_TEST_KEYS = ("dataset.test.", "dataloader.test.", "dataloader.evaluator.")


@dataclass(frozen=True)
class Run:
    """One training and test of one row.

    config: name with overlays.
    overrides: "key=value", without `train.output_dir`, which is `folder`.
    dtype: what the model computes in.
    trained: the run whose weights it tests, None if it trains its own.
    """

    config: str
    overrides: tuple[str, ...]
    seed: int
    max_iter: int
    dtype: str
    folder: Path
    trained: "Run | None" = None

    @property
    def done(self) -> bool:
        return (self.folder / _DONE).exists()

    def results(self) -> dict[str, Any]:
        """results.json of a finished run."""
        return json.loads((self.folder / "results.json").read_text())

    def seconds(self) -> float:
        """Wall-clock time that it has taken, all its starts together."""
        file = self.folder / _SECONDS
        return sum(map(float, file.read_text().split())) if file.exists() else 0.0

    def environment(self) -> str:
        """Hardware, versions and precision that a finished run ran with."""
        return json.loads((self.folder / _DONE).read_text())["environment"]


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the program if an argument that counts something is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be 1 or more")


def plan(
    configs: Iterable[str], scale: str, seeds: int, root: Path, overrides: Sequence[str] = ()
) -> dict[tuple[str, int], Run]:
    """The runs that rows need.

    Args:
        scale: key of `SCALES`.
        seeds: how many trainings a row, with `train.seed` 0, 1, ...
        root: folder of the runs' folders.

    Returns:
        {(config, seed): run}; rows whose configs are equal share a run.

    Raises:
        ConfigError: see `get_config`.
    """
    runs: dict[tuple[str, int], Run] = {}
    by_fingerprint: dict[str, Run] = {}
    by_training: dict[str, Run] = {}
    for seed in range(seeds):
        for config in configs:
            name = config + SCALES[scale]
            changes = (*overrides, f"train.seed={seed}")
            cfg = get_config(name, changes)
            keys: dict[str, Any] = deciding(cfg)
            if cfg.dataset.synthetic:
                keys["drawing"] = synthetic.VERSION
            whole = _fingerprint(keys)
            training = _fingerprint({k: v for k, v in keys.items() if not k.startswith(_TEST_KEYS)})
            if whole not in by_fingerprint:
                # Another table may have run it under another name.
                folder = next(
                    iter(sorted(root.glob(f"*-{whole}"))),
                    root / f"{config.replace('/', '.')}-seed{seed}-{whole}",
                )
                trained = by_training.get(training)
                dtype = str(precision(cfg) or torch.float32).removeprefix("torch.")
                run = Run(name, changes, seed, cfg.train.max_iter, dtype, folder, trained)
                by_fingerprint[whole] = run
                by_training.setdefault(training, run)
            runs[config, seed] = by_fingerprint[whole]
    return runs


def _fingerprint(keys: dict[str, Any]) -> str:
    return hashlib.sha1(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:10]


def execute(runs: Iterable[Run], scripts: Path, *, jobs: int, num_gpus: int) -> list[Run]:
    """Train and test what is not done, in this order, with a progress bar in a terminal.

    Args:
        scripts: folder of train.py and eval.py.
        jobs: how many at a time; on a CPU they share its cores, else the same GPUs.

    Returns:
        Runs that failed, and those that needed one of these; console.txt in their folder says why.

    Raises:
        SystemExit: after Ctrl-C or SIGTERM, when no training goes on.
    """
    # As Ctrl-C: no training goes on alone.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pending = list(dict.fromkeys(run for run in runs if not run.done))
    running: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[Run] = []
    with tqdm(total=len(pending), unit="run", disable=None if pending else True) as bar:
        try:
            while pending or running:
                ready = [r for r in pending if r.trained is None or r.trained.done]
                for run in ready[: jobs - len(running)]:
                    pending.remove(run)
                    running[run] = (_start(run, scripts, jobs, num_gpus), time.monotonic())
                if not running:  # what is left needs a run that failed
                    failed += pending
                    break
                bar.set_postfix_str(f"{len(running)} running")
                time.sleep(0.2)
                for run, (process, started) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    _spend(run, started)
                    bar.update()
                    outcome = _finish(run, process.returncode)
                    bar.write(f"{run.config} seed {run.seed}: {outcome}")
                    if not run.done:
                        failed.append(run)
        except KeyboardInterrupt:
            program = Path(sys.argv[0]).name
            sys.exit(f"{program}: interrupted; the same command continues where it stopped")
        finally:  # after an interruption nothing goes on in the background
            for process, _ in running.values():
                process.terminate()
            for run, (process, started) in running.items():
                process.wait()
                _spend(run, started)
            signal.signal(signal.SIGTERM, handler)
    return failed


def _start(run: Run, scripts: Path, jobs: int, num_gpus: int) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.trained:
        script = "eval.py"
        options = ["--weights", str(run.trained.folder / "model_final.pth")]
    else:
        script, options = "train.py", ["--resume", "--num-gpus", str(num_gpus)]
    options += ["--config-file", run.config, *run.overrides, f"train.output_dir={run.folder}"]
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    with (run.folder / "console.txt").open("ab") as console:
        return subprocess.Popen(
            [sys.executable, str(scripts / script), *options],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=env,
        )


def _spend(run: Run, started: float) -> None:
    with (run.folder / _SECONDS).open("a") as file:
        print(f"{time.monotonic() - started:.3f}", file=file)


def _finish(run: Run, code: int) -> str:
    """Mark a run that has succeeded as done; what came out, in one line."""
    if code or not (run.folder / "results.json").exists():
        return f"failed with exit code {code}, see {run.folder / 'console.txt'}"
    measured_on = f"{environment()}, {run.dtype}"
    content = {"config": run.config, "seed": run.seed, "environment": measured_on}
    with atomic_write(run.folder / _DONE) as file:
        file.write(json.dumps(content).encode() + b"\n")
    results = run.results()
    aps = {name: results[task]["AP"] for task, name in TASKS.items() if task in results}
    scores = [f"{n} AP n/a" if ap is None else f"{n} AP {ap:.1f}" for n, ap in aps.items()]
    return f"{', '.join(scores) or 'no annotations to score with'} in {run.seconds():.0f} s"
