"""tools/check_dataset.py, and the same check in front of train.py."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyCall
from detectron2.utils import comm

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.training import preflight, setup_datasets

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "check_dataset.py"
CONFIG = "table4_keypoints/keypoint_and_mask+synthetic"
SAMPLE = os.environ.get("MASK_RCNN_COCO_SAMPLE", "")


def run(*args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tool in this process; its exit code."""
    spec = importlib.util.spec_from_file_location("check_dataset", TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *args])
    with pytest.raises(SystemExit) as exit_:
        tool.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def bad(toy_dataset: Path, tmp_path: Path) -> Path:
    """The toy dataset's training file with two faults and a doubt."""
    content = json.loads((toy_dataset / "train.json").read_text())
    content["annotations"][0]["bbox"] = [1, 1, -5, 5]
    content["annotations"][1]["category_id"] = 99
    content["annotations"][2]["area"] = 1e6
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    return file


def own(train: Path, images: Path) -> list[str]:
    return [f"dataset.train.json={train}", f"dataset.train.images={images}"]


def test_a_sound_config(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("--config-file", CONFIG, *toy_overrides, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert code == 0
    assert re.search(r"person_keypoints_train.json: 12 images, \d+ annotations, 1 categories", out)
    assert re.search(r"person_keypoints_val.json: 6 images", out)
    assert out.splitlines()[-1].startswith("0 errors")


def test_a_bad_file_and_its_cleaned_copy(
    bad: Path,
    toy_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ("--images", str(toy_dataset / "train"))
    out_file = str(tmp_path / "clean.json")
    code = run("--json", str(bad), *args, "--fix", out_file, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert code == 1
    assert re.search(r"error +box-negative +1 +annotation 1 ", out)
    assert re.search(r"error +unknown-category +1 +annotation 2 ", out)
    assert re.search(r"warning +area-contradicts +1 +annotation 3 ", out)
    assert re.search(r"1 dropped: annotation, unknown-category\n", out)
    assert re.search(r"1 repaired: box-negative\n", out)
    assert out.splitlines()[-1] == "2 errors, 1 warnings"

    assert run("--json", out_file, *args, "--no-images", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 errors, 1 warnings; images not opened"


@pytest.mark.parametrize("plus", ["", "+"])
def test_a_number_of_classes_in_the_arguments_must_be_the_datasets(
    plus: str,
    toy_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = f"{plus}model.roi_heads.num_classes=5"
    assert run("--config-file", CONFIG, *toy_overrides, wrong, monkeypatch=monkeypatch) == 1
    assert "num_classes 5, classes 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--json --config-file is required"),
        (["--json", "a.json"], "--json needs --images"),
        (["--json", "a.json", "--images", ".", "a=b"], "'a=b' changes a config"),
        (["--config-file", CONFIG, "--fix", "b.json"], "go with --json"),
        (["--config-file", "no"], "no config 'no'"),
        (["--json", "a.json", "--images", ".", "--fix", "b.json"], "cannot be repaired"),
        (["--json", "a.json", "--images", ".", "--fix", "."], "--fix is '.'"),
        (["--json", "a.json", "--images", ".", "--fix", ""], "--fix is ''"),
        (["--config-file", "table2a_backbone/r50_fpn", "dataset.train.names=[x]"], "dataset 'x'"),
    ],
)
def test_mistakes_end_with_2(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not SAMPLE, reason="MASK_RCNN_COCO_SAMPLE is not set: no real images")
@pytest.mark.parametrize("file", ["instances.json", "person_keypoints.json"])
def test_real_images_have_no_error(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--json", f"{SAMPLE}/{file}", "--images", f"{SAMPLE}/images")
    assert run(*args, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 errors")


def test_train_stops_before_anything_is_written(
    bad: Path,
    toy_dataset: Path,
    toy_overrides: list[str],
    tmp_path: Path,
    run_python: Callable[..., Any],
) -> None:
    arguments = ["--config-file", "table2a_backbone/r50_fpn+synthetic", *toy_overrides]
    arguments += own(bad, toy_dataset / "train")
    done = run_python(REPOSITORY / "train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train.py: ")
    assert "(box-negative 1, unknown-category 1)" in last
    assert f"python tools/check_dataset.py {' '.join(arguments)}" in last
    assert "--fix" in last
    assert "area-contradicts" not in done.stderr  # the table has the warnings too
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def config(overrides: list[str]) -> Any:
    cfg = get_config("table2a_backbone/r50_fpn+synthetic", overrides)
    setup_datasets(cfg)
    return cfg


def test_a_registered_set_is_checked_too(
    bad: Path, toy_dataset: Path, toy_overrides: list[str]
) -> None:
    cfg = config(toy_overrides + own(bad, toy_dataset / "train"))
    cfg.dataset.train.json = ""
    with pytest.raises(DatasetError, match="box-negative 1, unknown-category 1"):
        preflight.check_datasets(cfg, "a config")


class OwnMapper:
    """Without `use_instance_mask`."""


@pytest.mark.parametrize("mapper", [LazyCall(OwnMapper)(), OwnMapper, lambda record: record])
def test_a_users_mapper_is_not_asked_for_masks(mapper: Any, toy_overrides: list[str]) -> None:
    cfg = config(toy_overrides)
    cfg.dataloader.train.mapper = mapper
    preflight.check_datasets(cfg, "a config")


def test_other_processes_learn_what_the_first_found(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(toy_overrides)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(preflight, "check_sets", pytest.fail)
    preflight.check_datasets(cfg, "a config")
    first = (None, DatasetError("3 errors"))
    monkeypatch.setattr(comm, "all_gather", lambda own: [first, own])
    with pytest.raises(DatasetError, match="3 errors"):
        preflight.check_datasets(cfg, "a config")


def test_missing_images_are_found_though_none_is_opened(
    toy_dataset: Path, toy_overrides: list[str], tmp_path: Path
) -> None:
    cfg = config(toy_overrides)
    cfg.dataset.train.images = str(tmp_path)
    with pytest.raises(DatasetError, match="image-missing 12"):
        preflight.check_datasets(cfg, "a config")
