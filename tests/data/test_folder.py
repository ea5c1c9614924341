"""A folder is enough to find a dataset in, and one set is enough to train and test on."""

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.data.folder import find_sets, locate_sets, split_by_image


def write(file: Path, images: Path, name: str = "a.jpg", count: int = 1) -> None:
    """A COCO file whose images lie in a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}],
    }
    for i in range(1, count + 1):
        of_image = name.replace("a.", f"a{i}." if count > 1 else "a.")
        (images / of_image).parent.mkdir(parents=True, exist_ok=True)
        (images / of_image).touch()
        document["images"].append({"id": i, "file_name": of_image, "width": 8, "height": 8})
        document["annotations"] += [{"id": 2 * i + j, "image_id": i} for j in (0, 1)]
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        # Roboflow; the set to test the final model on is left alone.
        (
            {"train/_annotations.coco.json": "train", "valid/_annotations.coco.json": "valid",
             "test/_annotations.coco.json": "test"},
            ("train/_annotations.coco.json", "train"),
            ("valid/_annotations.coco.json", "valid"),
        ),
        ({"train/_annotations.coco.json": "train", "test/_annotations.coco.json": "test"},
         ("train/_annotations.coco.json", "train"), ("test/_annotations.coco.json", "test")),
        # CVAT: one task, and subsets.
        ({"annotations/instances_default.json": "images"},
         ("annotations/instances_default.json", "images"), None),
        ({"annotations/instances_default.json": "images/default"},
         ("annotations/instances_default.json", "images/default"), None),
        ({"annotations/instances_Train.json": "images/Train",
          "annotations/instances_Validation.json": "images/Validation"},
         ("annotations/instances_Train.json", "images/Train"),
         ("annotations/instances_Validation.json", "images/Validation")),
        # COCO's own.
        ({"annotations/instances_train2017.json": "train2017",
          "annotations/person_keypoints_train2017.json": "train2017",
          "annotations/instances_val2017.json": "val2017",
          "annotations/captions_val2017.json": "val2017"},
         ("annotations/instances_train2017.json", "train2017"),
         ("annotations/instances_val2017.json", "val2017")),
        # What the synthetic data look like, and a file beside its images.
        ({"train.json": "train", "val.json": "val"}, ("train.json", "train"), ("val.json", "val")),
        ({"result.json": "."}, ("result.json", "."), None),
        # A repaired copy beside, and both sets in one file.
        ({"train.json": ".", "train_clean.json": ".", "val.json": "."},
         ("train.json", "."), ("val.json", ".")),
        ({"annotations/instances_train2017.json": "train2017",
          "annotations/instances_train2017_clean.json": "train2017"},
         ("annotations/instances_train2017.json", "train2017"), None),
        ({"train_val.json": "."}, ("train_val.json", "."), None),
        ({"train_val.json": ".", "test.json": "."}, ("train_val.json", "."), ("test.json", ".")),
        ({"train.json": ".", "train_val.json": "."}, ("train.json", "."), None),
    ],
)  # fmt: skip
def test_layouts(
    files: dict[str, str],
    train: tuple[str, str],
    test: tuple[str, str] | None,
    tmp_path: Path,
) -> None:
    for file, images in files.items():
        write(tmp_path / file, tmp_path / images)
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "labels.json").write_text("[1]")
    expected = {"train": train, "test": test} if test else {"train": train}
    found = find_sets(str(tmp_path))
    relative = {
        role: tuple(Path(p).relative_to(tmp_path).as_posix() for p in paths)
        for role, paths in found.items()
    }
    assert relative == expected


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "such as train.json"),
        ({"val.json": "."}, "val.json"),
        ({"one.json": ".", "two.json": "."}, "two.json"),
        ({"train.json": "elsewhere/deep"}, "a.jpg"),
    ],
)
def test_what_is_not_found_is_named(files: dict[str, str], named: str, tmp_path: Path) -> None:
    for file, images in files.items():
        write(tmp_path / file, tmp_path / images)
    with pytest.raises(DatasetError, match="dataset") as error:
        find_sets(str(tmp_path))
    assert named in str(error.value)
    with pytest.raises(DatasetError, match="no such folder"):
        find_sets(str(tmp_path / "none"))


def test_images_that_are_gone_leave_the_others_to_find(tmp_path: Path) -> None:
    write(tmp_path / "train.json", tmp_path / "images", count=3)
    (tmp_path / "images" / "a1.jpg").unlink()
    assert find_sets(str(tmp_path))["train"][1] == str(tmp_path / "images")


def test_a_split_is_by_image_and_always_the_same(tmp_path: Path) -> None:
    write(tmp_path / "all.json", tmp_path, count=40)
    files = split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path / "split")
    parts = [json.loads(Path(file).read_text()) for file in files]
    ids = [{image["id"] for image in part["images"]} for part in parts]
    assert len(ids[1]) == 4
    assert ids[0] | ids[1] == set(range(1, 41))
    for part, of_part in zip(parts, ids):
        assert {a["image_id"] for a in part["annotations"]} == of_part
        assert len(part["annotations"]) == 2 * len(of_part)
        assert part["categories"] == [{"id": 1, "name": "x"}]
    again = split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path / "again")
    assert [Path(f).read_bytes() for f in again] == [Path(f).read_bytes() for f in files]
    assert sorted(ids[1]) != [37, 38, 39, 40]  # not the last ones
    assert sorted(ids[1]) != [1, 2, 3, 4]


def test_a_keypoint_model_gets_the_keypoints_of_coco(tmp_path: Path) -> None:
    for name in ("instances", "person_keypoints", "captions"):
        write(tmp_path / f"annotations/{name}_train2017.json", tmp_path / "train2017")
    for row, name in (
        ("table2a_backbone/r50_fpn", "instances"),
        ("table5_multitask/keypoint_and_mask", "person_keypoints"),
    ):
        cfg = get_config(row, [f"dataset={tmp_path}"])
        locate_sets(cfg)
        assert Path(cfg.dataset.train.json).stem == f"{name}_train2017"
    (tmp_path / "annotations/person_keypoints_train2017.json").unlink()
    assert "instances" in find_sets(str(tmp_path), keypoints=True)["train"][0]


def test_nan_is_read_as_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "train.json", tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**content, "info": float("nan")}))
    assert find_sets(str(tmp_path))["train"] == (str(tmp_path / "train.json"), str(tmp_path))


def test_a_file_without_a_list_of_images_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"images": null, "annotations": []}')
    with pytest.raises(DatasetError, match=r"no training set.*train\.json"):
        find_sets(str(tmp_path))


_TWO = '{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b"}], "annotations": %s}'


@pytest.mark.parametrize(
    "content",
    [
        *("{}", '{"images": [{}], "annotations": []}', "[]", "no", "[" * 100_000),
        *(_TWO % "null", _TWO % "[{}]", _TWO % "[1]", _TWO.replace('"id": 1, ', "") % "[]"),
        _TWO % '[{"image_id": []}]',
    ],
)
def test_what_cannot_be_split_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(content)
    with pytest.raises(DatasetError, match=r"all\.json"):
        split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path)


def test_a_split_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "all.json", tmp_path, count=40)
    files = split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path / "split")
    before = [Path(f).read_bytes() for f in files]
    times = [Path(f).stat().st_mtime_ns for f in files]
    with pytest.raises(DatasetError, match=r"dataset\.split is 0\.2.*train\.json"):
        split_by_image(str(tmp_path / "all.json"), 0.2, tmp_path / "split")
    assert split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path / "split") == files
    assert [Path(f).read_bytes() for f in files] == before
    assert [Path(f).stat().st_mtime_ns for f in files] == times
    Path(files[0]).unlink()
    with pytest.raises(DatasetError, match=r"test\.json"):
        split_by_image(str(tmp_path / "all.json"), 0.2, tmp_path / "split")
    assert not Path(files[0]).exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    write(tmp_path / "all.json", tmp_path, count=10)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DatasetError, match=r"out/split cannot be written to"):
        split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path / "out" / "split")


def test_one_image_is_not_split(tmp_path: Path) -> None:
    write(tmp_path / "all.json", tmp_path)
    with pytest.raises(DatasetError, match=r"dataset\.split is 0\.1, which leaves 0 of"):
        split_by_image(str(tmp_path / "all.json"), 0.1, tmp_path)


def test_the_config_says_what_is_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "annotations/instances_default.json", tmp_path / "images", count=10)
    out = tmp_path / "out"
    overrides = [f"dataset={tmp_path}", "dataset.split=0.2", f"train.output_dir={out}"]
    cfg = get_config("table2a_backbone/r50_fpn", overrides)
    locate_sets(cfg)
    dataset = cfg.dataset
    assert (dataset.train.json, dataset.test.json) == (
        str(out / "split" / "train.json"),
        str(out / "split" / "test.json"),
    )
    assert dataset.train.images == dataset.test.images == str(tmp_path / "images")
    before = dataset.copy()
    locate_sets(cfg)  # as a config.yaml would be used again
    assert dataset == before


def test_a_folder_takes_the_place_of_drawn_images_but_keeps_their_size(tmp_path: Path) -> None:
    write(tmp_path / "train.json", tmp_path)
    write(tmp_path / "val.json", tmp_path)
    overrides = [f"dataset={tmp_path}", "dataset.synthetic.size=256"]
    cfg = get_config("table2a_backbone/r50_fpn+ablation", overrides)
    locate_sets(cfg)
    assert cfg.dataset.synthetic is None
    plain: Any = OmegaConf.to_container(cfg)
    loaders, rpn = plain["dataloader"], plain["model"]["proposal_generator"]
    assert loaders["train"]["mapper"]["augmentations"][0]["short_edge_length"] == [256]
    assert loaders["test"]["mapper"]["augmentations"][0]["short_edge_length"] == 256
    assert rpn["anchor_generator"]["sizes"] == [[16], [32], [64], [128], [256]]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["dataset=.", "dataset.train.json=a.json"], "dataset.folder"),
        (["dataset.test.json=a.json", "dataset=."], "dataset.folder"),
        (["dataset.split=0.1", "dataset.train.json=a.json", "dataset.test.json=b.json"], "b.json"),
        (["dataset.split=0.1"], "dataset.train.json"),
    ],
)
def test_sets_are_given_in_one_way(overrides: list[str], named: str) -> None:
    cfg = get_config("table2a_backbone/r50_fpn", overrides)
    with pytest.raises(DatasetError, match=named):
        locate_sets(cfg)


def test_a_folder_replaces_the_files_of_a_config_yaml(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        write(tmp_path / name / "train.json", tmp_path / name)
        write(tmp_path / name / "val.json", tmp_path / name)
    cfg = get_config("table2a_backbone/r50_fpn", [f"dataset={tmp_path / 'mine'}"])
    locate_sets(cfg)
    config = str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, config)
    other = tmp_path / "other"
    cfg = get_config(config, [f"dataset={other}"])
    locate_sets(cfg)
    assert cfg.dataset.train.json == str(other / "train.json")
    assert cfg.dataset.test.json == str(other / "val.json")
    for empty in ("dataset=", "dataset=null"):
        cfg = get_config(config, [empty])
        locate_sets(cfg)
        assert cfg.dataset.train.json == str(tmp_path / "mine" / "train.json")
    cfg = get_config(config, [f"dataset.test.json={other / 'val.json'}", f"dataset={other}"])
    with pytest.raises(DatasetError, match=r"dataset\.folder"):
        locate_sets(cfg)
