"""Time and peak memory of several ways to do one thing, side by side."""

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch


class Measurement(NamedTuple):
    """Of one function: milliseconds of each round; the most memory that it held at a time beyond
    what there was before, MiB, None where it can't be measured; what it returned."""

    ms: list[float]
    peak_mib: float | None
    result: Any

    @property
    def median_ms(self) -> float:
        return median(self.ms)


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: str, is_long: bool = False
) -> dict[str, Measurement]:
    """Call the functions in turn, A B A B, so that a slow moment of the machine meets all.

    Args:
        functions: by name.
        rounds: measured calls of each, after two that aren't.
        device: "cpu" or "cuda".
        is_long: one call each, without others before.
    """
    results, peaks = {}, {}
    ms: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        if not is_long:
            function()
        with _PeakMemory(device) as peak:
            elapsed, results[name] = _timed(function, device)
        peaks[name] = peak.mib
        if is_long:
            ms[name].append(elapsed)
    for _ in range(0 if is_long else rounds):
        for name, function in functions.items():
            ms[name].append(_timed(function, device)[0])
    return {name: Measurement(ms[name], peaks[name], results[name]) for name in functions}


def _timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device == "cpu":
        start = time.perf_counter()
        result = function()
        return 1000 * (time.perf_counter() - start), result
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    result = function()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event), result


class _PeakMemory:
    """The most memory held inside the block beyond what was held before it: of the GPU, or what is
    resident of this process, which Linux alone tells."""

    mib: float | None = None

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> "_PeakMemory":
        gc.collect()
        if self._device == "cpu":
            _return_free_memory()
            # 5 sets the high-water mark to what is resident now.
            self._reset = _try_write(Path("/proc/self/clear_refs"), "5")
            self._before = high_water_mib() if self._reset else None
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self._device == "cpu":
            self.mib = high_water_mib() - self._before
        else:
            torch.cuda.synchronize()
            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self._before


def _return_free_memory() -> None:
    """Hand what is free of the heap back to the system: a call would take it again unseen, or give
    it back in the middle. glibc's malloc alone keeps so much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _try_write(file: Path, text: str) -> bool:
    try:
        file.write_text(text)
    except OSError:
        return False
    return True


def high_water_mib() -> float:
    """The most that was resident of this process since it started, or since the mark was reset, in
    MiB; Linux. Not `ru_maxrss`, which a new process takes over from the one that starts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no line VmHWM")


def matmul_flops(device: str, dtype: torch.dtype, side: int = 4096) -> float:
    """Floating-point operations a second of a large matrix product: what the machine can do."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    ms = interleave({"product": lambda: a @ b}, 5, device)["product"].ms
    return 2 * side**3 / (min(ms) / 1000)
