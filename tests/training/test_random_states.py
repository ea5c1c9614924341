import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from mask_rcnn_plugin.training.random_states import RandomStates, random_states_kept


def draw() -> list[float]:
    # An odd number of normals: NumPy and torch keep the second one of a pair.
    return [
        *(random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()),
        *(torch.rand(1).item(), torch.randn(1).item()),
    ]


def test_what_is_drawn_after_loading_is_what_was_drawn_after_saving(tmp_path: Path) -> None:
    draw()
    torch.save(RandomStates().state_dict(), tmp_path / "a.pth")
    expected = draw() + draw()
    draw()
    RandomStates().load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    assert draw() + draw() == expected


def test_drawing_in_between_changes_nothing() -> None:
    with random_states_kept():
        expected = draw()
    assert draw() == expected


def test_a_run_on_a_cpu_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: pytest.fail("makes a context"))
    RandomStates().load_state_dict(RandomStates().state_dict())


def test_an_error_in_between_changes_nothing_either() -> None:
    with random_states_kept():
        expected = draw()
    with pytest.raises(ZeroDivisionError), random_states_kept():
        draw()[1 // 0]
    assert draw() == expected


def test_each_process_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    states, expected = [], []
    for _ in range(2):
        states += RandomStates().state_dict()["ranks"]
        expected.append(draw())
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        RandomStates().load_state_dict({"ranks": states})
        assert draw() == expected[rank]


def test_another_number_of_processes_is_said_and_seeds_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = RandomStates().state_dict()
    expected = draw()
    RandomStates().load_state_dict({"ranks": state["ranks"] * 2})
    assert "random states of 2 processes, but the run has 1 now" in caplog.text
    assert draw() != expected
