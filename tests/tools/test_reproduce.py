"""tools/reproduce.py end to end: a table of two rows, two iterations each."""

import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "reproduce.py"
ROWS = ["table2a_backbone/r50_fpn", "fpn_roi_layer/roipool"]
OUTPUT = Path("output/reproduce/synthetic")


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_tool", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs the tool in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
        tool.main()

    return main


@pytest.fixture
def toy(toy_dataset: Path) -> list[str]:
    return [
        *(f"dataset.synthetic.root={toy_dataset}", "dataset.synthetic.train=12"),
        *("dataset.synthetic.val=6", "dataset.synthetic.size=64", "train.max_iter=2"),
        *("dataloader.train.total_batch_size=2", "train.device=cpu"),
    ]


@pytest.fixture
def stand_in(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Makes code train.py and eval.py, in place of those of the repository."""

    def write(code: str) -> None:
        folder = tmp_path / "scripts"
        folder.mkdir()
        for name in ("train.py", "eval.py"):
            (folder / name).write_text(code)
        monkeypatch.setattr(tool, "SCRIPTS", folder)

    return write


def test_a_table_and_the_page_of_all(
    tool: ModuleType,
    run: Callable[..., None],
    toy: list[str],
    stand_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--table", "fpn_roi_layer", *toy)
    assert "2 trainings for 2 rows, 0 of them done" in capsys.readouterr().out
    content = json.loads((OUTPUT / "fpn_roi_layer.json").read_text())
    assert (content["table"], content["scale"], content["seeds"]) == (
        *("fpn_roi_layer", "synthetic"),
        1,
    )
    assert [row["config"] for row in content["rows"]] == ROWS
    for row in content["rows"]:
        (results,), (minutes,) = row["results"], row["minutes"]
        assert results["segm"].keys() > {"AP", "AP50"}
        assert results["ms_per_image"] > 0
        assert minutes > 0
        assert row["iterations"] == 2
    assert content["rows"][0]["paper"]["segm"]["AP"] == 33.6
    markdown = (OUTPUT / "fpn_roi_layer.md").read_text()
    for name in ("fpn_roi_layer.png", "fpn_roi_layer_pictures.jpg"):
        assert f"]({name})" in markdown
        assert cv2.imread(str(OUTPUT / name)).std() > 10

    assert "--table fpn_roi_layer" in content["command"]
    assert re.search(r"torch 2.*, mask_rcnn_plugin .*, (float32|bfloat16)$", content["environment"])

    # One row alone.
    run("--table", "fpn_roi_layer", "--row", ROWS[1], "--output", "alone", *toy)
    assert "1 trainings for 1 rows, 0 of them done" in capsys.readouterr().out
    alone = json.loads(Path("alone", "fpn_roi_layer.json").read_text())
    assert [bool(row["results"]) for row in alone["rows"]] == [False, True]

    # And then the other, beside it.
    run("--table", "fpn_roi_layer", "--row", ROWS[0], "--output", "alone", *toy)
    assert "1 trainings for 1 rows, 0 of them done" in capsys.readouterr().out
    both = json.loads(Path("alone", "fpn_roi_layer.json").read_text())
    assert all(row["results"] for row in both["rows"])

    # What is done is not done again.
    monkeypatch.setitem(tool.ALL, "synthetic", ["fpn_roi_layer"])
    stand_in("raise SystemExit(1)")
    run("--table", "all", *toy)
    assert "2 trainings for 2 rows, 2 of them done" in capsys.readouterr().out
    page = (OUTPUT / "index.md").read_text()
    assert markdown.strip() in page
    assert str(REPOSITORY) not in page
    assert "2 trainings (seeds a row: 1)" in page


def test_an_override_need_fit_the_chosen_rows_only(
    run: Callable[..., None],
    toy: list[str],
    stand_in: Callable[[str], None],
) -> None:
    stand_in("raise SystemExit(1)")
    mlp = ["--table", "2e", "--row", "table2e_mask_branch/mlp_2fc"]
    only_mlp = "model.roi_heads.mask_head.fc_dims=[8,8]"
    with pytest.raises(SystemExit, match="1 trainings failed"):
        run(*mlp, *toy, only_mlp)
    assert len([*(OUTPUT / "runs").iterdir()]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--table", "7"], "'7'"),
        (["--table", "2c", "--seeds", "0"], "--seeds is 0"),
        (
            ["--table", "2d", "--row", "table2d_stride32/x"],
            "one of table2d_stride32/roipool, table",
        ),
        (["--table", "2c", "--jobs", "-1"], "--jobs is -1"),
        (["--table", "2c", "train.max_iters=3"], "'train.max_iter'"),
        (["--table", "2c", "--scale", "coco"], "coco_2014_train"),
    ],
)
def test_mistakes_end_with_2_one_line_and_nothing_written(
    run: Callable[..., None],
    args: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_failed_training_is_an_exit_code_and_leaves_the_others(
    run: Callable[..., None],
    toy: list[str],
    stand_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in("raise SystemExit('no luck')")
    with pytest.raises(SystemExit, match="2 trainings failed"):
        run("--table", "fpn_roi_layer", *toy)
    printed = capsys.readouterr().out
    assert printed.count("console.txt") == 2
    assert printed.count("ours: not done") == 2


def test_a_terminated_reproduction_leaves_no_training_behind(
    run: Callable[..., None],
    toy: list[str],
    stand_in: Callable[[str], None],
    tmp_path: Path,
) -> None:
    started = tmp_path / "started"
    code = (
        "import os, pathlib, signal\n"
        f"part = pathlib.Path({str(started)!r} + '.part')\n"
        "part.write_text(str(os.getpid()))\n"
        "part.rename(part.with_suffix(''))\n"
        "signal.pause()\n"
    )
    stand_in(code)

    def terminate() -> None:
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        run("--table", "fpn_roi_layer", "--jobs", "1", *toy)
    assert stopped.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
