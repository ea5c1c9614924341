import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from PIL import Image

import mask_rcnn_plugin
from mask_rcnn_plugin import Predictor, get_config, load
from mask_rcnn_plugin.data.figures import KEYPOINTS
from mask_rcnn_plugin.data.mapper import ImageError
from mask_rcnn_plugin.data.synthetic import CATEGORIES
from mask_rcnn_plugin.errors import ConfigError, UserError
from mask_rcnn_plugin.inference.result import Result
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.weights import WeightsError


@pytest.fixture
def cfg(trained: Path) -> DictConfig:
    return get_config(str(trained / "config.yaml"))


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return load(trained)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(trained, tmp_path / "trained"))


@pytest.fixture
def photo(toy_dataset: Path) -> str:
    return str(toy_dataset / "val" / "000000.jpg")


def test_a_folder_is_all_that_is_needed(trained: Path, predictor: Predictor, photo: str) -> None:
    """As eval.py's loader and model answer, with names."""
    assert predictor.names == list(CATEGORIES)
    assert list(predictor.metadata.keypoint_names) == list(KEYPOINTS)
    result = predictor(photo)
    assert isinstance(result, Result)
    assert len(result) > 5
    cfg = get_config(str(trained / "config.yaml"))
    setup_datasets(cfg, training=False)
    (first, *_) = instantiate(cfg.dataloader.test)
    assert first[0]["file_name"] == photo
    with torch.no_grad():
        expected = predictor.model(first)[0]["instances"]
    for field in ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_keypoints"):
        ours, theirs = (getattr(i, field) for i in (result.instances, expected))
        if field == "pred_boxes":
            ours, theirs = ours.tensor, theirs.tensor
        assert torch.equal(ours, theirs), field
    assert result.names == [CATEGORIES[c] for c in expected.pred_classes]
    assert result.names[0] in repr(result)


def test_images_are_resized_as_in_the_evaluation(
    cfg: DictConfig, trained: Path, photo: str
) -> None:
    weights = str(trained / "model_final.pth")
    prepared = {}
    for resize in ("pillow", "opencv"):
        cfg.dataloader.test.mapper.resize = resize
        cfg.dataloader.test.mapper.augmentations[0].short_edge_length = 50
        predictor = Predictor.from_config(cfg, weights, optimize=False)
        prepared[resize] = predictor.prepare(photo)["image"]
        height, width = cv2.imread(photo).shape[:2]
        image = {"file_name": photo, "height": height, "width": width, "image_id": 1}
        assert torch.equal(prepared[resize], predictor.mapper(image)["image"])
    assert not torch.equal(prepared["pillow"], prepared["opencv"])


def test_all_kinds_of_images_are_one(predictor: Predictor, photo: str) -> None:
    images = [
        *(photo, Path(photo), Path(photo).as_uri(), Image.open(photo), cv2.imread(photo)),
        # A picture with a palette or transparency is one too.
        Image.open(photo).convert("RGBA"),
    ]
    results = predictor(images)
    assert len(results) == len(images)
    for result in [*results, *predictor(images, batch_size=4)]:
        assert result.scores == pytest.approx(results[0].scores, abs=1e-3)
        assert np.array_equal(result.plot(1.1), results[0].plot(1.1))  # the picture alone


def test_grey_arrays_are_grey_pictures(predictor: Predictor, photo: str) -> None:
    grey = cv2.imread(photo, cv2.IMREAD_GRAYSCALE)
    both = predictor([grey, np.repeat(grey[:, :, None], 3, axis=2)])
    assert both[0].scores == pytest.approx(both[1].scores, abs=1e-3)
    assert np.array_equal(both[0].plot(1.1), both[1].plot(1.1))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((8, 8, 4), np.uint8), "uint8 (8, 8, 4)"),
        (np.zeros((8, 8, 3), np.float32), "float32 (8, 8, 3)"),
        (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
        (7, "int"),
        ("no.jpg", "no.jpg: it does not exist"),
        (".", "must be one file"),
        ("photos/*.jpg", "must be one file"),
    ],
)
def test_what_is_no_image_is_one_line(image: Any, named: str, predictor: Predictor) -> None:
    with pytest.raises(ImageError) as error:
        predictor(image)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_results_are_what_other_libraries_take(predictor: Predictor, photo: str) -> None:
    result = predictor(photo)
    boxes, masks = result.instances.pred_boxes.tensor, result.instances.pred_masks

    detections = result.to_supervision()
    assert np.array_equal(detections.xyxy, boxes.numpy())
    assert np.array_equal(detections.mask, masks.numpy())
    assert detections.data["class_name"].tolist() == result.names
    assert detections.data["keypoints"].shape == (len(result), len(KEYPOINTS), 3)

    table = result.to_dataframe()
    assert table["name"].tolist() == result.names
    assert table[["x0", "y0", "x1", "y1"]].to_numpy().tolist() == boxes.tolist()
    assert table["area"].tolist() == masks.numpy().sum((1, 2)).tolist()
    assert set(table["file"]) == {photo}

    coco = result.to_coco(image_id=5)
    assert result.to_coco(image_id=5) == coco
    keypoints = np.array([found["keypoints"] for found in coco]).reshape(len(result), -1, 3)
    assert np.allclose(keypoints[..., :2] + 0.5, result.instances.pred_keypoints[..., :2])
    assert {found["image_id"] for found in coco} == {5}
    assert [CATEGORIES[found["category_id"] - 1] for found in coco] == result.names
    assert [found["category_name"] for found in coco] == result.names
    json.dumps(coco)


def test_nothing_found_is_an_empty_result(predictor: Predictor, photo: str, tmp_path: Path) -> None:
    result = predictor(photo).above(1.1)
    assert (len(result), result.names, result.to_coco()) == (0, [], [])
    assert len(result.to_supervision()) == 0
    assert len(result.to_dataframe()) == 0
    assert "nothing" in repr(result)
    result.save(tmp_path / "new" / "picture.png")
    assert Image.open(tmp_path / "new" / "picture.png").size == (480, 480)


def test_a_threshold_leaves_out_what_is_below(predictor: Predictor, photo: str) -> None:
    result = predictor(photo)
    middle = sorted(result.scores)[len(result) // 2]
    above = result.above(middle)
    assert above.scores == [score for score in result.scores if score >= middle]
    assert not np.array_equal(result.plot(middle), result.plot(0.0))


def test_a_picture_needs_a_format(predictor: Predictor, photo: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="picture"):
        predictor(photo).save(tmp_path / "picture")


def test_the_best_model_is_taken(folder: Path) -> None:
    state = torch.load(folder / "model_final.pth", weights_only=True)
    for key in state["model"]:
        if key.endswith("cls_score.bias"):
            state["model"][key] += 1
    torch.save(state, folder / "model_best.pth")
    best, final = load(folder), load(folder / "model_final.pth")
    bias = [p.model.roi_heads.box_predictor.cls_score.bias for p in (best, final)]
    assert torch.allclose(bias[0], bias[1] + 1)


def test_what_is_missing_is_said(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(WeightsError, match="model_final"):
        load(empty)
    (folder / "config.yaml").rename(empty / "config.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(folder)
    assert load(folder, config=str(empty / "config.yaml")).names == list(CATEGORIES)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", r"no model_final\.pth.* it has .*pictures/"),
        ("detectron2://a/b.pkl", "config"),
        ("file.pth", r"b\.pkl; folders pictures/"),
    ],
)
def test_what_is_not_there_is_said_plainly(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "b.pkl").touch()
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert "config.yaml" not in str(error.value)


def test_a_device_that_is_not_there_is_one_line(folder: Path) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device.* '{device}'"):
            load(folder, device=device)


def test_old_configs_have_names_where_their_dataset_is(cfg: DictConfig, trained: Path) -> None:
    old = cfg.copy()
    del old.dataset["metadata"]
    assert load(trained, config=old).names == list(CATEGORIES)
    old.dataset.test.update(json="gone.json", names=["nowhere"])
    assert load(trained, config=old).names[:2] == ["class 0", "class 1"]


def test_the_papers_rows_know_cocos_names(tmp_path: Path) -> None:
    cfg = get_config("table2a_backbone/r50_fpn", ["model.backbone.width=8"])
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "weights.pth")
    predictor = Predictor.from_config(cfg, str(tmp_path / "weights.pth"), optimize=False)
    assert predictor.names[:2] == ["person", "bicycle"]
    assert predictor.metadata.thing_dataset_id_to_contiguous_id[90] == 79


def test_a_mapper_of_ones_own_is_named(cfg: DictConfig, trained: Path) -> None:
    cfg.dataloader.test.mapper = {"_target_": "builtins.dict"}
    with pytest.raises(ConfigError, match=r"dataloader\.test\.mapper is a dict"):
        Predictor.from_config(cfg, str(trained / "model_final.pth"))


def test_the_package_offers_it() -> None:
    assert {"load", "Predictor"} <= set(mask_rcnn_plugin.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        mask_rcnn_plugin.no_such_name  # noqa: B018
