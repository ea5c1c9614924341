"""tools/check_dataset.py, and the same check in front of train.py."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check_dataset
import pytest
from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.data.synthetic import CATEGORIES as SHAPES
from mask_rcnn_plugin.training import preflight, setup_datasets

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "check_dataset.py"
CONFIG = "table4_keypoints/keypoint_and_mask+synthetic"
SAMPLE = os.environ.get("MASK_RCNN_COCO_SAMPLE", "")


def run(*args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tool in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *args])
    with pytest.raises(SystemExit) as exit_:
        check_dataset.main()
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
    assert re.search(r"person_keypoints_train.json: 12 images, \d+ annotations, 1 category", out)
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
    assert out.splitlines()[-1] == "2 errors, 1 warning"

    assert run("--json", out_file, *args, "--no-images", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 errors, 1 warning; images not opened"


def test_a_split_is_checked_and_not_kept(
    toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = [*own(toy_dataset / "train.json", toy_dataset / "train"), "dataset.split=0.2"]
    monkeypatch.chdir(tmp_path)
    assert run("--config-file", "table2a_backbone/r50_fpn", *split, monkeypatch=monkeypatch) == 0
    assert not list(tmp_path.iterdir())


def test_a_limit_below_the_objects_is_said_by_both(
    toy_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    few = [*toy_overrides, "dataset.test.max_detections=1"]
    few += ["model.proposal_generator.post_nms_topk=[50,1]"]
    cfg = config(few)
    preflight.check_datasets(cfg, "a config")
    args = ("--config-file", "table2a_backbone/r50_fpn+synthetic", *few)
    assert run(*args, monkeypatch=monkeypatch) == 0
    for told in (caplog.text, " ".join(capsys.readouterr().out.split())):
        assert re.search("of 6 test images have more objects .*dataset.test.max_detections", told)
        assert "model.proposal_generator.post_nms_topk" in told


@pytest.mark.parametrize("plus", ["", "+"])
def test_a_number_of_classes_in_the_arguments_must_be_the_datasets(
    plus: str,
    toy_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = f"{plus}model.roi_heads.num_classes=5"
    assert run("--config-file", CONFIG, *toy_overrides, wrong, monkeypatch=monkeypatch) == 1
    assert "num_classes is 5, must be 1" in capsys.readouterr().out


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


REGISTRATION = """
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from mask_rcnn_plugin import get_config

for _split, _fields in {fields}.items():
    def _load(split=_split):
        records = load_coco_json(f"{root}/{{split}}.json", f"{root}/{{split}}")
        for number, record in enumerate(records):
            record["image_id"] = f"photo {{number}}"
            for annotation in record["annotations"]:
                annotation["category_id"] -= 1
        {change}
        return records

    DatasetCatalog.register(f"own_{{_split}}", _load)
    MetadataCatalog.get(f"own_{{_split}}").set(thing_classes={classes}, **_fields)

_cfg = get_config("table2a_backbone/r50_fpn+synthetic")
_cfg.dataset.train.json = _cfg.dataset.train.images = None
_cfg.dataset.test.json = _cfg.dataset.test.images = None
_cfg.dataset.train.names, _cfg.dataset.test.names = ["own_train"], ["own_val"]
model, dataloader, optimizer, lr_multiplier, train, dataset = (
    _cfg[k] for k in ("model", "dataloader", "optimizer", "lr_multiplier", "train", "dataset")
)
"""
# What LVIS has: a file that is not COCO's, and one that is not there.
FIELDS = [{}, {"evaluator_type": "lvis", "json_file": "/no/lvis.json", "image_root": "/no"}]


@pytest.fixture
def registered(toy_dataset: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Writes a config that registers datasets by a function."""

    def write(fields: dict[str, Any], change: str = "", classes: str = "") -> str:
        classes = classes or str(list(SHAPES))
        both = {"train": fields, "val": fields}
        text = REGISTRATION.format(fields=both, root=toy_dataset, change=change, classes=classes)
        (tmp_path / "own.py").write_text(text)
        return str(tmp_path / "own.py")

    yield write
    for name in ("own_train", "own_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("fields", FIELDS)
def test_what_a_loader_of_its_own_gives_is_checked(
    fields: dict[str, Any],
    registered: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--config-file", registered(fields), monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert re.search(r"own_train: 12 images, \d+ annotations, 5 categories", out)
    assert re.search(r"own_val: 6 images, \d+ annotations, 5 categories", out)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("records[0]['annotations'][0]['bbox'] = [1, 1, -5, 5]", 1, "box-negative"),
        ("records[3]['file_name'] = '/no/such.png'", 1, "image-missing"),
        ("for r in records: r['annotations'][0].pop('segmentation')", 1, "mask-missing"),
        ("records[0]['annotations'][0]['segmentation'] = {3: 4}", 0, "not-checked"),
        ("raise ImportError('needs a package')", 2, "own_train.*ImportError: needs a package"),
    ],
)
def test_what_is_wrong_in_a_loader_of_its_own(
    change: str,
    code: int,
    words: str,
    registered: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = registered({}, change)
    assert run("--config-file", config, monkeypatch=monkeypatch) == code
    captured = capsys.readouterr()
    assert re.search(words, captured.out + captured.err)


@pytest.mark.parametrize("fields", FIELDS)
def test_a_training_on_a_loader_of_its_own(
    fields: dict[str, Any],
    registered: Callable[..., str],
    tmp_path: Path,
    run_python: Callable[..., Any],
) -> None:
    options = ["dataloader.train.total_batch_size=2", "train.max_iter=1", "train.device=cpu"]
    args = ["--config-file", registered(fields), *options, f"train.output_dir={tmp_path / 'out'}"]
    done = run_python(REPOSITORY / "train.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"bbox", "segm"} <= results.keys()
    predictions = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {p["category_id"] for p in predictions} <= {0, 1, 2, 3, 4}
    assert all(p["image_id"].startswith("photo ") for p in predictions)


def test_two_test_sets_are_a_finding_beside_those_of_each(
    registered: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, two = registered({}), "dataset.test.names=[own_val, own_train]"
    assert run("--config-file", config, two, monkeypatch=monkeypatch) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert re.search("refused.*one test set", out)
    assert (out.count("own_val: 6 images"), out.count("own_train: 12 images")) == (1, 2)


def test_a_dataset_without_class_names_is_refused(
    registered: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = registered({}, classes="[]")
    assert run("--config-file", config, monkeypatch=monkeypatch) == 1
    assert re.search(r"refused(.|\n)*own_train(.|\n)*thing_classes", capsys.readouterr().out)


FISH = {"id": 1, "name": "fish", "keypoints": ["left_eye", "right_eye", "tail"]}


@pytest.mark.parametrize(
    ("sigmas", "overrides", "words"),
    [
        (None, [], "sigmas"),
        (None, ["dataloader.evaluator.kpt_oks_sigmas=[0.1,0.1]"], "2 values"),
        ([0.1, 0.1, 0.1], ["dataset.test.images=TRAIN"], "two image folders"),
        ([0.1, 0.1, 0.1], [], "min_keypoints"),  # no keypoint is labelled
        ([0.1, 0.1, 0.1], ["dataloader.train.dataset.min_keypoints=0"], ""),
    ],
)
def test_what_train_refuses_is_a_finding(
    sigmas: list[float] | None,
    overrides: list[str],
    words: str,
    tmp_path: Path,
    toy_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads((toy_dataset / "train.json").read_text())
    content["categories"] = [{**FISH, "keypoint_sigmas": sigmas}]
    for found in content["annotations"]:
        found |= {"category_id": 1, "keypoints": [0] * 9, "num_keypoints": 0}
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    args = [f"dataset.{s}.json={tmp_path / s}.json" for s in ("train", "test")]
    args += [f"dataset.{s}.images={toy_dataset / 'train'}" for s in ("train", "test")]
    if "TRAIN" in "".join(overrides):
        args[1] = f"dataset.test.json={tmp_path / 'train'}.json"
        overrides = [f"dataset.test.images={tmp_path}"]
    code = run(
        *("--config-file", "table4_keypoints/keypoint_only+synthetic", *args, *overrides),
        monkeypatch=monkeypatch,
    )
    out = " ".join(capsys.readouterr().out.split())
    assert code == bool(words)
    assert ("refused" in out) == bool(words)
    assert words in out


def test_missing_images_are_found_though_none_is_opened(
    toy_dataset: Path, toy_overrides: list[str], tmp_path: Path
) -> None:
    cfg = config(toy_overrides)
    cfg.dataset.train.images = str(tmp_path)
    with pytest.raises(DatasetError, match="image-missing 12"):
        preflight.check_datasets(cfg, "a config")
