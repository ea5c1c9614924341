"""The benchmark's tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

PEERS = ("detectron2", "detectron2 tuned", "torchvision", "plugin")
_TRAINED = "on random weights; judged on trained ones, see --trained"


def to_markdown(report: Mapping[str, Any]) -> str:
    """A page of what `tools/benchmark.py` measured, as its --json has it."""
    parts = [f"{report['environment']}, {report['versions']}", f"`{report['command']}`"]
    if rows := report.get("stages"):
        times = [f"{peer} ms" for peer in PEERS]
        headers = ["stage", *times, "ratio", "detectron2 MiB", "plugin MiB", "difference"]
        parts.append(table(headers, [stage_cells(row) for row in rows]))
    if m := report.get("evaluation_memory"):
        headers = ["images of 100 detections evaluated", "memory grown by, MB", "ms an image"]
        per_image = f"{1000 * m['seconds'] / m['images']:.2g}"
        parts.append(table(headers, [[f"{m['images']:,}", number(m["grown_mb"]), per_image]]))
    if measured := report.get("dataset_check"):
        sizes = ["images, not opened", "annotations", "file, MB"]
        headers = [*sizes, "seconds", "memory grown by, MB"]
        parts.append(table(headers, [_check_cells(m) for m in measured]))
    if rows := report.get("counts"):
        parts.append(counts_table(rows))
    if m := report.get("loader"):
        headers = ["loader", "images a CPU second", "times detectron2's"]
        speeds = m["images_per_second"].items()
        parts.append(table(headers, [[k, f"{v:.1f}", f"{m['ratio'][k]:.2f}"] for k, v in speeds]))
        off = m["pixel_difference"]
        parts.append(
            f"Pixels of resize=opencv differ by {off['mean']:.2f} of 255 on average, at most by "
            f"{off['max']}."
        )
    if m := report.get("startup"):
        steps = ("registration", "check", "load", "first batch")
        headers = [f"{m['images']:,} images, CPU s", *steps, "together", "memory grown by, MiB"]
        rows = []
        for peer, seconds in m["seconds"].items():
            cells = [seconds.get(step) for step in steps]
            cells += [sum(seconds.values()), m["peak_mib"][peer]]
            rows.append([peer, *map(number, cells)])
        parts.append(table(headers, rows))
    if report.get("bf16"):
        parts.append(f"bf16 on a trained model: {agreement(report['bf16'])}.")
    if gpu := report.get("gpu"):
        parts += _gpu_parts(gpu)
    return "\n\n".join(parts) + "\n"


def _gpu_parts(gpu: Mapping[str, Any]) -> list[str]:
    """What tools/gpu_check.py found."""
    parts = []
    if tests := gpu.get("tests"):
        line = "Tests marked `cuda`: " + ", ".join(f"{n} {k}" for k, n in tests["counts"].items())
        parts.append("\n".join([line + ".", "", *(f"* `{name}`" for name in tests["failed"])]))
    height, width = gpu["size"]
    parts.append(
        f"{gpu['images']} images of {height} x {width} at once, random weights. Peak memory is "
        "all that the step held, weights included. The plugin's masks are RLE on the host, "
        "detectron2's bitmaps on the device."
    )
    tables: dict[str, list[list[str]]] = {}
    for row in gpu["rows"]:
        title = f"{row['what']}, {row['model']}, {row['precision']}"
        tables.setdefault(title, []).append(_variant_cells(row, gpu["images"]))
    headers = ["", "ms an image", "range", "images a second", "peak MiB"]
    parts += [table([title, *headers[1:]], lines) for title, lines in tables.items()]
    if counted := gpu.get("waits"):
        headers = ["peer", "waits", "copies", "operators", "waits that CUDA reports"]
        parts.append(
            table(
                ["counted, a batch of 2", *headers], [c for w in counted for c in _waits_cells(w)]
            )
        )
        lines = [f"{n} {line}" for w in counted for line, n in w.get("lines", {}).items()]
        if lines:
            bullets = [f"* `{line}`" for line in lines]
            parts.append("\n".join(["The plugin's lines that CUDA reports:", "", *bullets]))
    return parts


def _variant_cells(row: Mapping[str, Any], images: int) -> list[str]:
    if "error" in row:
        return [row["variant"], row["error"].replace("|", "/"), "", "", ""]
    low, high = (number(ms / images) for ms in row["ms_range"])
    speed = number(1000 * images / row["ms"])
    mib = number(row["peak_mib"])
    return [row["variant"], number(row["ms"] / images), f"{low} to {high}", speed, mib]


def _waits_cells(row: Mapping[str, Any]) -> list[list[str]]:
    """A line for each peer."""
    seen = row.get("seen", {})
    return [
        [row["name"], peer, *(f"{n:,}" for n in counts), str(seen.get(peer, "not run"))]
        for peer, counts in row["counts"].items()
    ]


def stage_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells, its times and ratio as `summary` shows them."""
    low, high = row["ratio_range"]
    limit = _TRAINED if row["allowed"] is None else f"allowed: {row['allowed']:.0e}"
    return [
        row["name"],
        *_times(row),
        f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})",
        *(number(row["peak_mib"][peer]) for peer in ("detectron2", "plugin")),
        f"{row['difference']:.1e} {row['difference_unit']} ({limit})",
    ]


def counts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    headers = ["on a GPU, 2 images", "", "waits", "copies to the device", "operators"]
    lines = [
        [row["name"], peer, *(f"{number:,}" for number in numbers)]
        for row in rows
        for peer, numbers in row["counts"].items()
    ]
    return table(headers, lines)


def launching_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """How long the host launches the operators of `counts_table`, at 5 to 20 µs each."""
    lines = [
        [row["name"], *(f"{n * 0.005:.1f} to {n * 0.02:.1f}" for _, _, n in row["counts"].values())]
        for row in rows
    ]
    return table(["launching, ms", *rows[0]["counts"]], lines)


def _check_cells(m: Mapping[str, Any]) -> list[str]:
    file, grown = number(m["file_mb"]), number(m["grown_mb"])
    return [f"{m['images']:,}", f"{m['annotations']:,}", file, f"{m['seconds']:.1f}", grown]


def summary(report: Mapping[str, Any]) -> str:
    """The table of docs/speed.md."""
    headers = ["ms", "detectron2", "tuned", "torchvision", "plugin", "detectron2 / plugin"]
    lines = [[row["name"], *_times(row), f"{row['ratio']:.2f}"] for row in report["stages"]]
    return table(headers, lines)


def _times(row: Mapping[str, Any]) -> list[str]:
    cells = [number(row["ms"].get(peer)) for peer in PEERS]
    if layout := row.get("baseline"):
        cells[0] += f" ({layout})"
    return cells


def agreement(bf16: Mapping[str, Any]) -> str:
    """How the half-precision model's detections agree with the exact one's, in words."""
    return (
        f"{bf16['found']:.1%} of the {bf16['boxes']} detections in {bf16['images']} images are "
        "found again, of the same class and at IoU > 0.95"
    )


def table(headers: list[str], lines: list[list[str]]) -> str:
    return tabulate(lines, headers, "pipe", disable_numparse=True)


def number(value: float | None) -> str:
    """Three digits at least of a positive number; "" for None."""
    if value is None:
        return ""
    if value < 1:
        return "< 1"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
