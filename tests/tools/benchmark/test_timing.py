"""Interleaved measuring."""

import numpy as np
import pytest

from benchmark.timing import interleave


def test_functions_take_turns() -> None:
    calls = []
    functions = {name: lambda n=name: calls.append(n) or n for name in "AB"}
    measured = interleave(functions, 3, "cpu")
    assert "".join(calls) == "AABB" + "ABABAB"
    for name, m in measured.items():
        assert len(m.ms) == 3
        assert m.median_ms == sorted(m.ms)[1] > 0
        assert m.result == name


def test_long_functions_are_called_once() -> None:
    calls = []
    measured = interleave({"A": lambda: calls.append("A")}, 3, "cpu", is_long=True)
    assert calls == ["A"]
    assert len(measured["A"].ms) == 1


def test_peak_memory_is_of_the_call_alone() -> None:
    def hold(mib: int) -> float:
        return float(np.ones(mib * 2**17).sum())

    measured = interleave({"large": lambda: hold(200), "small": lambda: hold(50)}, 1, "cpu")
    if measured["large"].peak_mib is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert 190 < measured["large"].peak_mib < 260
    assert 40 < measured["small"].peak_mib < 110


def test_memory_that_an_earlier_call_left_free_counts() -> None:
    def hold(pieces: int) -> int:
        return len([bytes(10_000) for _ in range(pieces)])

    hold(10_000)
    (measured,) = interleave({"small": lambda: hold(1000)}, 1, "cpu").values()
    if measured.peak_mib is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert 8 < measured.peak_mib < 30
