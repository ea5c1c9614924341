import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from omegaconf import DictConfig

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError, register_coco_dataset
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.training.setup import check_exists, make_output_dir


def own_dataset(folder: Path, categories: list[dict[str, Any]], name: str) -> list[str]:
    """A file and the overrides that name it."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return [f"dataset.{name}.json={file}", f"dataset.{name}.images={folder}"]


def config(name: str, folder: Path, train: list[Any], test: list[Any] | None = None) -> DictConfig:
    test = train if test is None else test
    overrides = own_dataset(folder, train, "train") + own_dataset(folder, test, "test")
    return get_config(name, overrides)


CAT, DOG = {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}
FISH = {"id": 1, "name": "fish", "keypoints": ["left_eye", "right_eye", "tail"]}
FISH_SIZED = {**FISH, "keypoint_sigmas": [0.1, 0.1, 0.2]}


def test_number_of_classes_comes_from_the_dataset(tmp_path: Path) -> None:
    cfg = config("table2a_backbone/r50_fpn", tmp_path, [CAT, DOG])
    setup_datasets(cfg)
    heads = cfg.model.roi_heads
    assert heads.num_classes == heads.box_predictor.num_classes == heads.mask_head.num_classes == 2
    assert cfg.dataloader.train.dataset.names == [str(tmp_path / "train.json")]
    assert cfg.dataloader.evaluator.dataset_name == [str(tmp_path / "test.json")]


def test_keypoints_come_from_the_dataset(tmp_path: Path) -> None:
    cfg = config("table4_keypoints/keypoint_only", tmp_path, [FISH_SIZED])
    setup_datasets(cfg)
    assert cfg.model.roi_heads.keypoint_head.num_keypoints == 3
    assert cfg.dataloader.train.mapper.keypoint_hflip_indices == [1, 0, 2]
    assert instantiate(cfg.dataloader.evaluator)._kpt_oks_sigmas == [0.1, 0.1, 0.2]


def own_mapper(record: dict[str, Any], scale: float) -> dict[str, Any]:
    return record


@pytest.mark.parametrize("mapper", [LazyCall(own_mapper)(scale=2.0), own_mapper])
def test_a_mapper_of_ones_own_is_left_as_it_is(tmp_path: Path, mapper: Any) -> None:
    cfg = config("table4_keypoints/keypoint_only", tmp_path, [FISH_SIZED])
    cfg.dataloader.train.mapper = mapper
    before = copy.deepcopy(cfg.dataloader.train.mapper)
    setup_datasets(cfg)
    assert cfg.dataloader.train.mapper == before


def test_images_without_keypoints_are_left_out_of_keypoint_training(tmp_path: Path) -> None:
    def annotation(image: int, visibility: int) -> dict[str, Any]:
        keypoints = [5.0, 5.0, visibility] * 3
        box = {"bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0, "category_id": 1}
        return {"id": image, "image_id": image, "keypoints": keypoints, **box}

    cfg = config("table4_keypoints/keypoint_only", tmp_path, [FISH_SIZED])
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 10, "width": 10} for i in (1, 2, 3)]
    annotations = [annotation(1, visibility=2), annotation(2, visibility=0)]
    for split in ("train", "test"):
        content = {"images": images, "annotations": annotations, "categories": [FISH_SIZED]}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    setup_datasets(cfg)
    assert [d["image_id"] for d in instantiate(cfg.dataloader.train.dataset)] == [1]
    assert [d["image_id"] for d in instantiate(cfg.dataloader.test.dataset)] == [1, 2, 3]


def test_missing_sigmas_are_an_error_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="OKS sigmas must be given"):
        setup_datasets(config("table4_keypoints/keypoint_only", tmp_path, [FISH]))


def test_sigmas_are_not_needed_where_keypoints_are_not_evaluated(tmp_path: Path) -> None:
    cfg = config("table5_multitask/keypoint_and_mask", tmp_path, [FISH])
    cfg.dataloader.evaluator.tasks = ["bbox", "segm"]
    setup_datasets(cfg)
    cfg = get_config(
        "table4_keypoints/keypoint_only",
        [*own_dataset(tmp_path, [FISH], "train"), "dataset.test.names=[]"],
    )
    setup_datasets(cfg)
    assert cfg.model.roi_heads.keypoint_head.num_keypoints == 3


def test_given_sigmas_are_taken(tmp_path: Path) -> None:
    cfg = config("table4_keypoints/keypoint_only", tmp_path, [FISH])
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.3, 0.3, 0.3]
    setup_datasets(cfg)
    assert cfg.dataloader.evaluator.kpt_oks_sigmas == [0.3, 0.3, 0.3]
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.3, 0.3]
    with pytest.raises(DatasetError, match="kpt_oks_sigmas has 2 values, but .* has 3 keypoints"):
        setup_datasets(cfg)


def test_a_datasets_own_sigmas_of_a_wrong_number_are_an_error_before_the_training(
    tmp_path: Path,
) -> None:
    cfg = config("table4_keypoints/keypoint_only", tmp_path, [FISH])
    name = register_coco_dataset(cfg.dataset.test.json, cfg.dataset.test.images)
    MetadataCatalog.get(name).keypoint_oks_sigmas = [0.3, 0.3]
    cfg.dataset.test.json = cfg.dataset.test.images = None
    cfg.dataset.test.names = [name]
    with pytest.raises(DatasetError, match="kpt_oks_sigmas has 2 values, but .* has 3 keypoints"):
        setup_datasets(cfg)


def test_keypoint_branch_without_keypoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no category of .* has keypoints"):
        setup_datasets(config("table4_keypoints/keypoint_only", tmp_path, [CAT]))


def test_other_classes_in_the_test_set_are_an_error(tmp_path: Path) -> None:
    horse = {"id": 2, "name": "horse"}
    with pytest.raises(DatasetError, match=r"thing_classes differ .*1: 'dog' / 'horse'"):
        setup_datasets(config("table2a_backbone/r50_fpn", tmp_path, [CAT, DOG], [CAT, horse]))
    with pytest.raises(DatasetError, match="the longer one has more"):
        setup_datasets(config("table2a_backbone/r50_fpn", tmp_path, [CAT, DOG], [CAT]))


def test_images_without_annotation_file_are_an_error(tmp_path: Path) -> None:
    cfg = get_config("table2a_backbone/r50_fpn", [f"dataset.train.images={tmp_path}"])
    with pytest.raises(DatasetError, match="is set without json"):
        setup_datasets(cfg)


def test_coco_that_is_not_there_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DatasetError, match="coco_2014_train.*does not exist. Set DETECTRON2_DATA"):
        setup_datasets(get_config("table2a_backbone/r50_fpn"))


def test_synthetic_dataset_is_drawn_where_it_is_used(tmp_path: Path) -> None:
    root = tmp_path / "drawn"
    name = "table2a_backbone/r50_fpn+synthetic"
    drawing = [f"dataset.synthetic.root={root}", "dataset.synthetic.size=64"]
    few = ["dataset.synthetic.train=2", "dataset.synthetic.val=2"]
    own = own_dataset(tmp_path, [CAT], "train") + own_dataset(tmp_path, [CAT], "test")
    setup_datasets(get_config(name, drawing + few + own))
    assert not root.exists()
    cfg = get_config(name, drawing + few)
    setup_datasets(cfg)
    assert (root / "train.json").is_file()
    assert cfg.model.roi_heads.num_classes == 5
    with pytest.raises(DatasetError, match=r"dataset\.synthetic: .*drawn"):
        setup_datasets(get_config(name, [*drawing, "dataset.synthetic.train=3"]))
    inside = f"dataset.synthetic.root={root / 'train.json'}"
    with pytest.raises(DatasetError, match=r"dataset\.synthetic: .*train\.json"):
        setup_datasets(get_config(name, [inside, "dataset.synthetic.size=64", *few]))


def test_a_default_synthetic_folder_depends_on_what_is_drawn() -> None:
    name, drawing = "table2a_backbone/r50_fpn+synthetic", "dataset.synthetic"
    keys = ["size=256", "train=2", "val=3", "seed=4"]
    configs = [get_config(name, [f"{drawing}.{key}" for key in keys[:n]]) for n in range(5)]
    roots = [cfg.dataset.synthetic.root for cfg in configs]
    assert len(set(roots)) == 5
    assert configs[4].dataset.train.json == f"{roots[4]}/train.json"
    assert get_config(name, [f"{drawing}.root=a"]).dataset.test.json == "a/val.json"


def test_an_output_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        cfg = get_config("table2a_backbone/r50_fpn", [f"train.output_dir={tmp_path / folder}"])
        with pytest.raises(ConfigError, match="train.output_dir is .*, which cannot be written to"):
            make_output_dir(cfg)


def test_an_output_folder_without_room_is_an_error(tmp_path: Path, file_size_limit: Any) -> None:
    cfg = get_config("table2a_backbone/r50_fpn", [f"train.output_dir={tmp_path}"])
    message = "train.output_dir is .*, which cannot be written to"
    with file_size_limit(1000), pytest.raises(ConfigError, match=message):
        make_output_dir(cfg)


def test_evaluation_needs_no_training_set(tmp_path: Path) -> None:
    overrides = own_dataset(tmp_path, [FISH_SIZED], "test")
    cfg = get_config("table4_keypoints/keypoint_only", overrides)
    setup_datasets(cfg, training=False)
    assert cfg.model.roi_heads.num_classes == 1
    assert cfg.model.roi_heads.keypoint_head.num_keypoints == 3


@pytest.mark.parametrize(
    ("names", "training"), [([], False), (["coco_2014_minival", "coco_2017_val"], True)]
)
def test_there_is_one_test_set(
    names: list[str], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mask_rcnn_plugin.training.setup.check_exists", lambda name: None)
    cfg = get_config("table2a_backbone/r50_fpn")
    cfg.dataset.test.names = names
    with pytest.raises(DatasetError, match="one test set"):
        setup_datasets(cfg, training=training)


def test_one_file_with_two_image_folders_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    overrides = own_dataset(tmp_path, [CAT], "train")
    both = [f"dataset.test.json={tmp_path / 'train.json'}", f"dataset.test.images={tmp_path / 'a'}"]
    with pytest.raises(DatasetError, match="has two image folders"):
        setup_datasets(get_config("table2a_backbone/r50_fpn", overrides + both))


def test_unknown_dataset_name_is_an_error() -> None:
    cfg = get_config("table2a_backbone/r50_fpn", ["dataset.train.names=[no_such_set]"])
    with pytest.raises(DatasetError, match="no dataset 'no_such_set'"):
        setup_datasets(cfg)


@pytest.mark.parametrize("known", [{}, {"json_file": "nowhere.json", "image_root": "nowhere"}])
def test_a_coco_file_registered_as_a_function_is_as_its_metadata_say(
    known: dict[str, str], tmp_path: Path
) -> None:
    own_dataset(tmp_path, [CAT], "train")
    name = f"own_{len(known)}"
    load = partial(load_coco_json, str(tmp_path / "train.json"), str(tmp_path), name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(thing_classes=["cat"], evaluator_type="coco", **known)
    try:
        with pytest.raises(DatasetError, match="does not exist") if known else nullcontext():
            check_exists(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
