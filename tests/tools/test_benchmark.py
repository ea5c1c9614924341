"""tools/benchmark.py end to end, at a small size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmark.stages import Peers, Row

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_and_json(tmp_path: Path) -> None:
    arguments = ["--size", "96", "128", "--rounds", "2", "--json", "out/numbers.json"]
    done = run("--stage", "mask", "mask-targets", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert report["command"].startswith("python tools/benchmark.py --stage mask mask-targets")
    assert "torch" in report["environment"]
    names = [row["name"] for row in report["stages"]]
    assert names == [
        *("mask branch, 80 classes", "mask branch, 1203 classes"),
        *("mask targets, polygons", "mask targets, bitmaps"),
    ]
    first = report["stages"][0]
    assert set(first["ms"]) == {"detectron2", "plugin", "torchvision"}
    assert all(ms > 0 for ms in first["ms"].values())
    low, high = first["ratio_range"]
    assert low <= first["ratio"] <= high
    for row in report["stages"]:
        assert row["difference"] <= row["allowed"]
        assert f"| {row['name']} " in done.stdout
    assert f"**{first['ratio']:.2f}** ({low:.2f} to {high:.2f})" in done.stdout
    assert str(tmp_path) not in done.stdout


def test_a_wrong_result_is_no_success(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(peers: Peers) -> list[Row]:
        return [
            Row("sum", {"detectron2": lambda: 1, "plugin": lambda: 2}, lambda a, b: a - b, "", 0.1)
        ]

    monkeypatch.setattr(tool, "Peers", lambda *args: None)
    monkeypatch.setitem(tool.STAGES, "mask", stage)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--stage", "mask", "--rounds", "1"])
    with pytest.raises(SystemExit, match="results differ more than allowed: sum"):
        tool.main()
    assert "| sum " in capsys.readouterr().out


def test_data_sets_are_checked_in_the_sizes_of_the_stage(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "DATASET_SIZES", [(5, 20), (1_000, 30)])
    file = tmp_path / "numbers.json"
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "--stage", "dataset-check", "--json", str(file)]
    )
    tool.main()
    rows = json.loads(file.read_text())["dataset_check"]
    assert [(row["images"], row["annotations"]) for row in rows] == [(5, 20), (1_000, 30)]
    printed = capsys.readouterr().out
    for row, start in zip(rows, ("| 5 ", "| 1,000 ")):
        (line,) = (line for line in printed.splitlines() if line.startswith(start))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == str(row["annotations"])
        assert cells[3:5] == [f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f}"]


@pytest.mark.parametrize("page", ["cpu", "evaluation_memory", "dataset_check"])
def test_pages_show_the_committed_numbers(tool: ModuleType, page: str) -> None:
    folder = TOOL.parent.parent / "docs" / "benchmarks"
    report = json.loads((folder / f"{page}.json").read_text())
    assert (folder / f"{page}.md").read_text() == tool.to_markdown(report) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "masks"], "invalid choice: 'masks'"),
        (["--rounds", "0"], "--rounds is 0, must be 1 or more"),
        (["--size", "32", "640"], "--size is [32, 640], must be 64 or more each"),
        (["--stage", "bf16"], "--stage bf16 needs --trained DIR"),
        (["--trained", "nowhere"], "--trained is nowhere, where there is no model_final.pth"),
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
