"""tools/reproduce.py end to end: a table of two rows, two iterations each."""

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "reproduce.py"
ROWS = ["table2a_backbone/r50_fpn", "fpn_roi_layer/roipool"]


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arguments(toy_dataset: Path) -> list[str]:
    return [
        *("--table", "fpn_roi_layer", "--scale", "synthetic", "--seeds", "1"),
        *(f"dataset.synthetic.root={toy_dataset}", "dataset.synthetic.train=12"),
        *("dataset.synthetic.val=6", "dataset.synthetic.size=64", "train.max_iter=2"),
        *("dataloader.train.total_batch_size=2", "train.device=cpu"),
    ]


@pytest.fixture(scope="module")
def reproduced(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the table was reproduced."""
    folder = tmp_path_factory.mktemp("reproduce")
    done = run(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 trainings for 2 rows, 0 of them done" in done.stdout
    assert "ours: not done" not in done.stdout
    return folder


def test_a_table_is_written(reproduced: Path) -> None:
    output = reproduced / "output" / "reproduce" / "synthetic"
    content = json.loads((output / "fpn_roi_layer.json").read_text())
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
    assert [c["verdict"] for c in content["claims"]] == ["one seed"] * 2
    assert content["rows"][0]["paper"]["segm"]["AP"] == 33.6

    markdown = (output / "fpn_roi_layer.md").read_text()
    assert "RoIAlign beats RoIPool on an FPN" in markdown
    assert "one seed" in markdown
    for name in ("fpn_roi_layer.png", "fpn_roi_layer_pictures.jpg"):
        assert f"]({name})" in markdown
        assert cv2.imread(str(output / name)).std() > 10


def test_what_is_done_is_not_done_again_and_all_is_one_page(
    reproduced: Path,
    arguments: list[str],
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(reproduced)
    monkeypatch.setitem(tool.ALL, "synthetic", ["fpn_roi_layer"])
    arguments = ["all" if a == "fpn_roi_layer" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    runs = sorted(Path("output/reproduce/synthetic/runs").glob("*/model_final.pth"))
    before = [file.stat().st_mtime_ns for file in runs]
    tool.main()
    assert len(before) == 2
    assert [file.stat().st_mtime_ns for file in runs] == before
    assert "2 trainings for 2 rows, 2 of them done" in capsys.readouterr().out

    page = Path("output/reproduce/synthetic/index.html").read_text()
    assert page.count("<img ") == 2
    assert page.count("data:image/") == 2
    assert "Sigmoid masks beat softmax masks (Table 2b)" in page
    assert REPOSITORY.as_posix() not in page
    assert "reproduce.py --table all" in page
    assert "(fpn_roi_layer.png)" in Path("output/reproduce/synthetic/index.md").read_text()
    claims = json.loads(Path("output/reproduce/synthetic/claims.json").read_text())
    assert {c["verdict"] for c in claims} == {"one seed", "not run"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--table", "7"], "invalid choice: '7'"),
        (["--table", "2c", "--seeds", "0"], "--seeds is 0, must be 1 or more"),
        (["--table", "2c", "--jobs", "-1"], "--jobs is -1, must be 1 or more"),
        (["--table", "2c", "train.max_iters=3"], "did you mean 'train.max_iter'"),
        (["--table", "2c", "--scale", "coco"], "coco_2014_train"),
    ],
)
def test_mistakes_end_with_2_one_line_and_nothing_written(
    tmp_path: Path, args: list[str], message: str
) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failed_training_is_an_exit_code_and_leaves_the_others(
    arguments: list[str], tmp_path: Path
) -> None:
    done = run(*arguments, "optimizer.lr=1e30", cwd=tmp_path)
    assert done.returncode == 1
    assert "2 trainings failed, see above" in done.stderr
    assert "console.txt" in done.stdout
    assert done.stdout.count("ours: not done") == 2


def test_a_terminated_reproduction_leaves_no_training_behind(
    arguments: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(TOOL), *arguments, "train.max_iter=100000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        seen = ""
        while "running" not in seen and process.poll() is None:
            seen += process.stderr.read(1)
        process.terminate()
        process.stderr.read()
        assert process.wait() == 128 + signal.SIGTERM
    runs = list(tmp_path.glob("output/reproduce/synthetic/runs/*"))
    assert runs
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # one that has just ended
            assert not any(str(run.name) in cmdline.read_text() for run in runs)
