"""tools/benchmark.py end to end, at a small size."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmark import data, memory
from benchmark.report import stage_cells, to_markdown
from benchmark.stages import Comparison, Peers
from benchmark.timing import Measurement

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_and_json(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--size", "64", "96", "--rounds", "2", "--json", "out/numbers.json"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--stage", "masks-to-rle", *arguments])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(  # without the models, which this stage doesn't use
        tool, "Peers", lambda device, size: SimpleNamespace(device=device, size=size, detections=5)
    )
    tool.main()
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert report["command"].startswith("python tools/benchmark.py --stage masks-to-rle --size")
    assert "torch" in report["environment"]
    (row,) = report["stages"]
    assert row["name"] == "masks to RLE"
    assert row["baseline"] is None
    assert set(row["ms"]) == {"detectron2", "plugin"}
    assert all(ms > 0 for ms in row["ms"].values())
    low, high = row["ratio_range"]
    assert low <= row["ratio"] <= high
    assert row["difference"] <= row["allowed"]
    assert f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})" in printed
    assert str(tmp_path) not in printed


def measurement(*ms: float) -> Measurement:
    return Measurement(list(ms), 1.0, ms[0])


@pytest.mark.parametrize(
    ("contiguous", "channels_last", "baseline", "ratio"),
    [((10, 12, 11), (8, 9, 30), "channels-last", 4.5), ((6, 6, 7), (8, 9, 30), "contiguous", 3.0)],
)
def test_the_faster_layout_of_detectron2_counts(
    tool: ModuleType,
    contiguous: tuple[float, ...],
    channels_last: tuple[float, ...],
    baseline: str,
    ratio: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = {
        "detectron2": measurement(*contiguous),
        "detectron2 channels-last": measurement(*channels_last),
        "plugin": measurement(2, 2, 2),
    }
    monkeypatch.setattr(tool, "interleave", lambda *_: measured)
    row = tool.measure(Comparison("step", {}, lambda a, b: a - b, "", 1.0), 3, "cpu")
    faster = contiguous if baseline == "contiguous" else channels_last
    assert row["baseline"] == baseline
    assert row["ms"] == {"detectron2": sorted(faster)[1], "plugin": 2}
    assert row["ratio"] == ratio
    assert row["difference"] == 2 - faster[0]
    assert f"({baseline})" in stage_cells(row)[1]


def test_a_row_says_that_its_agreement_needs_trained_weights(tool: ModuleType) -> None:
    runs = {"detectron2": lambda: 2.0, "plugin": lambda: 1.0}
    comparisons = [
        Comparison("x", runs, lambda a, b: b - a, "", allowed, once=True) for allowed in (None, 2.0)
    ]
    cells = [stage_cells(tool.measure(comparison, 1, "cpu")) for comparison in comparisons]
    assert "trained" in cells[0][-1]
    assert "trained" not in cells[1][-1]


def test_a_wrong_result_is_no_success(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(peers: Peers) -> list[Comparison]:
        runs = {"detectron2": lambda: 1, "plugin": lambda: 2}
        return [Comparison("sum", runs, lambda a, b: a - b, "", 0.1)]

    monkeypatch.setattr(tool, "Peers", lambda *args: None)
    monkeypatch.setitem(tool.STAGES, "mask", stage)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--stage", "mask", "--rounds", "1"])
    with pytest.raises(SystemExit, match="results differ more than allowed: sum"):
        tool.main()
    assert "| sum " in capsys.readouterr().out


def test_datasets_are_checked_in_the_sizes_of_the_stage(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(images: int, annotations: int) -> dict[str, float]:
        sizes = {"images": images, "annotations": annotations, "file_mb": 561.4}
        return {**sizes, "seconds": 30.21, "grown_mb": 765.2}

    monkeypatch.setattr(memory, "dataset_check", check)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--stage", "dataset-check"])
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["100,000", "1,000,000", "561", "30.2", "765"] in cells
    assert sum(line[-1] == "765" for line in cells) == len(memory.DATASET_SIZES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "masks"], "'masks'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--size", "32", "640"], "--size is [32, 640]"),
        (["--stage", "bf16"], "--trained DIR"),
        (["--trained", "nowhere"], "--trained is nowhere"),
    ],
)
def test_mistakes(
    tool: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_loader_and_the_start_are_measured() -> None:
    loader = data.loader_speed(rounds=1, images=2)
    assert loader["images_per_second"].keys() == loader["ratio"].keys()
    assert all(speed > 0 for speed in loader["images_per_second"].values())
    assert 0 < loader["pixel_difference"]["mean"] < 1
    assert loader["pixel_difference"]["max"] <= 1  # 640 x 480 is enlarged
    startup = data.startup(images=20, annotations=60)
    assert startup["seconds"]["plugin"].keys() == {"registration", "check", "load", "first batch"}
    heading = {"environment": "here", "versions": "some", "command": "measure"}
    page = to_markdown({**heading, "loader": loader, "startup": startup})
    assert "plugin, resize=opencv" in page
    assert "20 images" in page


def test_the_page_of_counts() -> None:
    rows = [
        {"name": "inference, masks", "counts": {"detectron2": (46, 18, 797), "plugin": (8, 3, 525)}}
    ]
    page = to_markdown({"environment": "e", "versions": "v", "command": "c", "counts": rows})
    cells = [line.strip("|").split("|") for line in page.splitlines() if "masks" in line]
    assert [[c.strip() for c in row[1:]] for row in cells] == [
        ["detectron2", "46", "18", "797"],
        ["plugin", "8", "3", "525"],
    ]
