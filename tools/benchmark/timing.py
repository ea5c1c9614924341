"""Time and peak memory of several ways to do one thing, side by side."""

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

# Shorter functions are repeated until they have taken so long.
_MIN_SECONDS = 0.2


class Measurement(NamedTuple):
    """Of one function: milliseconds of each round; the most memory it held beyond what was there
    before, MiB, None where that can't be measured; what it returned."""

    ms: list[float]
    peak_mib: float | None
    result: Any

    @property
    def median_ms(self) -> float:
        return median(self.ms)


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: str, once: bool = False
) -> dict[str, Measurement]:
    """Time the functions in turn, A B A B, so that a slow moment of the machine meets all.

    `once`: a single call of each, for functions that take minutes and can't be repeated.
    """
    ms: dict[str, list[float]] = {name: [] for name in functions}
    peaks: dict[str, float | None] = {}
    results: dict[str, Any] = {}
    for _ in range(1 if once else rounds):
        for name, function in functions.items():
            results.pop(name, None)
            turn = _one_call if once else _turn
            with PeakMemory(device) as peak:
                seconds, results[name] = turn(function)
            ms[name].append(1000 * seconds)
            peaks[name] = peak.mib
    return {name: Measurement(ms[name], peaks[name], results[name]) for name in functions}


def _turn(function: Callable[[], Any]) -> tuple[float, Any]:
    """Warmed up first, repeated while it is short: the median, and the last result."""
    result: list[Any] = []
    timer = Timer(
        "result.append(function())",
        setup="result.clear()",  # what the last call returned is not held during this one
        globals={"function": function, "result": result},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=_MIN_SECONDS).median, result[-1]


def _one_call(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


class PeakMemory:
    """The most memory held inside the block beyond what was held before it, in MiB: of the GPU, or
    resident in this process, which only Linux tells."""

    mib: float | None = None

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._before: float | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
            return self
        # Free memory that glibc keeps would be taken again unseen.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is held now
            self._before = _high_water_mib()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            if self._cuda:
                torch.cuda.synchronize()
                self.mib = torch.cuda.max_memory_allocated() / 2**20 - self._before
            else:
                self.mib = _high_water_mib() - self._before


def _high_water_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
