"""Interleaved measuring."""

from itertools import groupby

import numpy as np
import pytest

from benchmark.timing import PeakMemory, interleave


def test_functions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.timing._MIN_SECONDS", 0.0)
    calls: list[str] = []
    functions = {name: lambda n=name: calls.append(n) or n for name in "AB"}
    measured = interleave(functions, 3, "cpu")
    assert "".join(name for name, _ in groupby(calls)) == "ABABAB"
    for name, m in measured.items():
        assert len(m.ms) == 3
        assert m.median_ms == sorted(m.ms)[1] > 0
        assert m.result == name


def test_what_cannot_be_repeated_is_called_once() -> None:
    calls: list[str] = []
    measured = interleave({"A": lambda: calls.append("A")}, 3, "cpu", once=True)
    assert calls == ["A"]
    assert len(measured["A"].ms) == 1


def test_peak_memory_is_of_the_call_alone() -> None:
    def hold(mib: int) -> float:
        return float(np.ones(mib * 2**17).sum())

    functions = {"large": lambda: hold(200), "small": lambda: hold(50)}
    measured = interleave(functions, 1, "cpu", once=True)
    if measured["large"].peak_mib is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert 190 < measured["large"].peak_mib < 260
    assert 40 < measured["small"].peak_mib < 110


def test_memory_that_an_earlier_call_left_free_counts() -> None:
    def hold(pieces: int) -> int:
        return len([bytes(10_000) for _ in range(pieces)])

    hold(10_000)
    with PeakMemory("cpu") as peak:
        hold(1000)
    if peak.mib is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert 8 < peak.mib < 30
