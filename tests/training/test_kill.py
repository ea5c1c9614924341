"""Trainings in processes of their own, which are killed or signalled."""

import importlib
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mask_rcnn_plugin.training.checkpoint import check_readable
from mask_rcnn_plugin.training.preemption import EXIT_CODE

KILLS, ITERATIONS = 20, 40
PATIENCE = 120  # seconds, for what takes one


@pytest.fixture(scope="module")
def training() -> Iterator[Any]:
    """Starts a process for a function of training_process.py; imports are done once for all."""
    context: Any = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        module = importlib.import_module("training_process")
        context.set_forkserver_preload(["mask_rcnn_plugin", "mask_rcnn_plugin.training"])

        def start(function: str, *arguments: Any) -> Any:
            receiver, sender = context.Pipe(duplex=False)
            target = getattr(module, function)
            process = context.Process(target=target, args=(sender, *arguments), daemon=False)
            process.start()
            sender.close()
            return process, receiver

        yield start


def messages(receiver: Any) -> Iterator[tuple[str, int]]:
    """Until the process ends."""
    while receiver.poll(PATIENCE):
        try:
            yield receiver.recv()
        except EOFError:
            return
    raise AssertionError(f"no progress in {PATIENCE} s")


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_a_training_killed_at_20_random_moments_ends_as_one_that_was_not(
    training: Any, toy_overrides: list[str], tmp_path: Path
) -> None:
    def overrides(folder: str) -> list[str]:
        output = f"train.output_dir={tmp_path / folder}"
        return [*toy_overrides, output, f"train.max_iter={ITERATIONS}"]

    process, receiver = training("run", overrides("whole"))
    calls = [n for kind, n in messages(receiver) if kind == "calls"]
    process.join()
    assert process.exitcode == 0
    assert len(calls) == ITERATIONS

    rng = random.Random(0)
    killed = tmp_path / "killed"
    half_written = had_one = 0
    for kill in range(KILLS):
        # Three in four inside a save, one wherever the process is when the signal comes.
        if kill % 4:
            moment = rng.randint(1, 2), rng.randint(1, min(calls))
            process, receiver = training("run", overrides("killed"), *moment)
            for _ in messages(receiver):
                pass
        else:
            process, receiver = training("run", overrides("killed"))
            for _ in zip(range(rng.randint(1, 4)), messages(receiver)):
                pass
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        half_written += any(killed.glob("*.tmp"))
        tag = killed / "last_checkpoint"
        assert tag.exists() >= had_one
        had_one = tag.exists()
        if had_one:
            check_readable(killed / tag.read_text())
        for checkpoint in killed.glob("*.pth"):
            check_readable(checkpoint)
    assert half_written >= 5
    assert had_one

    process, receiver = training("run", overrides("killed"))
    steps = [n for kind, n in messages(receiver) if kind == "step"]
    process.join()
    assert process.exitcode == 0
    assert 0 < steps[0] < ITERATIONS
    ours, theirs = final(killed), final(tmp_path / "whole")
    assert ours["iteration"] == theirs["iteration"] == ITERATIONS - 1
    assert all(torch.equal(v, ours["model"][k]) for k, v in theirs["model"].items())
    assert ours["loader"] == theirs["loader"]
    assert not list(killed.glob("*.tmp"))


def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_iteration(
    training: Any, toy_overrides: list[str], tmp_path: Path
) -> None:
    overrides = [*toy_overrides, "train.max_iter=1000"]
    store = str(tmp_path / "store")
    ranks = [training("run_rank", rank, overrides, store) for rank in range(2)]
    last = [-1, -1]
    for rank, (_, receiver) in enumerate(ranks):
        while last[rank] < 3:
            _, last[rank] = next(messages(receiver))
    os.kill(ranks[1][0].pid, signal.SIGTERM)
    for rank, (process, receiver) in enumerate(ranks):
        for _, iteration in messages(receiver):
            last[rank] = iteration
        process.join(PATIENCE)
        assert process.exitcode == EXIT_CODE
    saved = max((tmp_path / "out").glob("model_*.pth"))
    assert [saved.stem] * 2 == [f"model_{iteration:07d}" for iteration in last]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == saved.name
    content = torch.load(saved, weights_only=True)
    assert len(content["random"]["ranks"]) == 2
    assert content["loader"]["position"] == 2 * (content["iteration"] + 1)
