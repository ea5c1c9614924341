"""The arithmetic of docs/scaling.md."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import instantiate

from benchmark.report import launching_table
from mask_rcnn_plugin import get_config

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "scaling.md").read_text()
STEP, INFERENCE = 0.261, 0.043  # seconds, published


def measured(name: str) -> Any:
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


AP = round(next(r for r in measured("cpu")["stages"] if "COCO" in r["name"])["ms"]["plugin"] / 1000)


def table(heading: str) -> dict[str, list[str]]:
    """Cells of a table's rows by their first cell, for the table whose head has `heading`."""
    (block,) = [b for b in PAGE.split("\n\n") if b.startswith("|") and heading in b.split("\n")[0]]
    lines = [line.strip("| ").split(" | ") for line in block.splitlines()]
    return {" ".join(cells[:2] if heading == "GB/s" else cells[:1]): cells for cells in lines}


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def agree(cell: str, *values: float) -> None:
    """A cell has these numbers, rounded as it shows them."""
    shown = re.findall(r"\d[\d,]*(?:\.\d+)?", cell)
    digits = [len(n.partition(".")[2]) for n in shown]
    assert numbers(cell)[: len(values)] == [round(v, d) for v, d in zip(values, digits)], cell


def test_launching_is_operators_times_a_launch() -> None:
    counts = {"detectron2": [70, 24, 1580], "plugin": [6, 3, 1000]}
    row = launching_table([{"name": "step", "counts": counts}]).splitlines()[-1]
    assert numbers(row) == [7.9, 31.6, 5.0, 20.0]


def test_how_fast_a_gpu_outruns_the_launches() -> None:
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| training step, masks  "))
    step, outrun = numbers(row), re.findall(r"261 / ([\d.]+) = (\d+) times as fast", PAGE)
    for launching, (slowest, times) in zip(step[1::2], outrun, strict=True):
        assert float(slowest) == launching
        agree(times, STEP * 1000 / float(slowest))


def test_what_is_measured_elsewhere() -> None:
    assert f"{AP} s for 5,000 images" in PAGE
    run = measured("evaluation_memory")["evaluation_memory"]
    kept = run["grown_mb"]
    assert f"{kept / run['images'] * 1000:.0f} kB an image" in PAGE
    assert f"{kept:.0f} MB for 5,000" in PAGE
    assert f"{kept / run['images'] * 1000:.0f} kB per image" in (DOCS / "speed.md").read_text()


@pytest.mark.parametrize("row", ["r50_fpn", "r101_fpn", "x101_fpn"])
def test_gradients(row: str) -> None:
    model = instantiate(get_config(f"table2a_backbone/{row}").model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _, parameters, exact, half, _ = table("parameters")[row]
    agree(parameters, trained)
    agree(exact, trained * 4 / 1e6)
    agree(half, trained * 2 / 1e6)


def test_all_reduce() -> None:
    models = table("parameters")
    rows = list(table("GB/s").values())[2:]
    assert len(rows) == 8
    for gpus, bandwidth, *cells in rows:
        n, given = int(gpus), float(bandwidth)
        for cell, (model, size) in zip(
            cells, [("r50_fpn", 4), ("r50_fpn", 2), ("x101_fpn", 4)], strict=True
        ):
            sent = size * numbers(models[model][1])[0]
            agree(cell, 2 * (n - 1) / n * sent / (given * 1e9) * 1000)


def test_what_changes_with_the_number_of_gpus() -> None:
    columns = list(zip(*list(table("| 1 | 8 |").values())[2:], strict=True))[1:]
    for gpus, column in zip((1, 8, 64, 512), columns, strict=True):
        batch = 2 * gpus
        seconds = 160_000 * 16 / batch * STEP
        inference = 8 * 5000 * INFERENCE / gpus
        evaluation = inference + 8 * AP
        expected = [batch, 0.02 * batch / 16, 160_000 * 16 / batch, 1000 * 16 / batch]
        expected += [seconds / 3600, inference, 8 * AP, 100 * evaluation / (seconds + evaluation)]
        expected += [batch / STEP * 0.15e6 / 1e9]
        for cell, value in zip(column, expected, strict=True):
            agree(cell, value)
