"""Evaluation: the numbers are COCO's, whatever form the predictions come in."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask_rcnn_plugin.data.coco import DatasetError, register_coco_dataset
from mask_rcnn_plugin.evaluation import (
    PREDICTIONS_FILE,
    MaskRCNNCOCOEvaluator,
    average_precision,
    evaluator,
)
from mask_rcnn_plugin.evaluation.evaluator import ScoringError, keypoint_oks_sigmas
from mask_rcnn_plugin.evaluation.predictions import coco_results
from mask_rcnn_plugin.modeling import RLEMasks

TASKS = ("bbox", "segm", "keypoints")


@pytest.fixture
def dataset(toy_dataset: Path) -> str:
    return register_coco_dataset(str(toy_dataset / "val.json"), str(toy_dataset / "val"))


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    text = counts if isinstance(counts, str) else counts.decode()
    return {"size": [height, width], "counts": text}


def corners(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def perfect_predictions(image: dict[str, Any], shift: float = 0.0) -> Instances:
    """The ground truth as predictions, boxes and keypoints moved by `shift` pixels."""
    size = image["height"], image["width"]
    annotations = [a for a in image["annotations"] if not a.get("iscrowd")]
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
    instances = Instances(size)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) + shift)
    instances.scores = torch.linspace(1, 0.5, len(annotations))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations]).long()
    instances.pred_masks = RLEMasks([to_rle(a["segmentation"], *size) for a in annotations])
    keypoints = torch.tensor([a.get("keypoints", [0.0] * 51) for a in annotations])
    instances.pred_keypoints = keypoints.reshape(-1, 17, 3).float()
    instances.pred_keypoints[:, :, :2] += shift
    return instances


def evaluated(
    evaluator: COCOEvaluator, dataset: str, shift: float = 0.0, bitmaps: bool = False
) -> dict[str, dict[str, float]]:
    evaluator.reset()
    for image in DatasetCatalog.get(dataset):
        instances = perfect_predictions(image, shift)
        if bitmaps:
            masks = list(instances.pred_masks)
            empty = torch.zeros((0, image["height"], image["width"]), dtype=torch.bool)
            instances.pred_masks = torch.stack(masks) if masks else empty
        evaluator.process([image], [{"instances": instances}])
    return evaluator.evaluate()


def test_perfect_predictions_score_100(dataset: str, tmp_path: Path) -> None:
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS, output_dir=str(tmp_path))
    results = evaluated(evaluator, dataset)
    for task in TASKS:
        assert results[task]["AP"] == pytest.approx(100), task
    # Keypoints of shapes: not bad, but not there.
    assert results["keypoints"]["AP-person"] == pytest.approx(100)
    assert np.isnan(results["keypoints"]["AP-circle"])
    predictions = json.loads((tmp_path / PREDICTIONS_FILE).read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation", "keypoints"} == set(
        predictions[0]
    )
    assert evaluator.backend.split()[0] in ("pycocotools", "faster-coco-eval", "detectron2")


def test_an_unknown_task_is_refused_before_any_prediction(dataset: str) -> None:
    there_is = r"tasks are \['bbox', 'seg'\], must be of .*'segm', 'keypoints', 'box_proposals'"
    with pytest.raises(ValueError, match=there_is):
        MaskRCNNCOCOEvaluator(dataset, ["bbox", "seg"])


def test_shifted_predictions_score_less(dataset: str) -> None:
    results = evaluated(MaskRCNNCOCOEvaluator(dataset, TASKS), dataset, shift=3.0)
    assert 0 < results["bbox"]["AP"] < 90
    assert 0 < results["keypoints"]["AP"] < 90
    assert results["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("bitmaps", [False, True])
def test_numbers_and_file_are_those_of_the_stock_evaluator(
    dataset: str, bitmaps: bool, official: bool, limit: int | None, tmp_path: Path
) -> None:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    evaluator = MaskRCNNCOCOEvaluator(
        *(dataset, ("bbox", "segm"), False, str(ours)), official=official, max_dets_per_image=limit
    )
    results = evaluated(evaluator, dataset, 2.0, bitmaps)
    their_evaluator = COCOEvaluator(
        *(dataset, ("bbox", "segm"), False, str(stock)),
        **{"use_fast_impl": False, "max_dets_per_image": limit},
    )
    their_results = evaluated(their_evaluator, dataset, 2.0, bitmaps=True)
    assert list(results) == list(their_results)
    for task, metrics in their_results.items():
        assert results[task] == pytest.approx(metrics, rel=0, abs=1e-10, nan_ok=True), task
    ours_written, theirs_written = ((f / PREDICTIONS_FILE).read_text() for f in (ours, stock))
    assert json.loads(ours_written) == json.loads(theirs_written)
    assert len(ours_written) == len(theirs_written)
    assert [f.name for f in ours.iterdir()] == [PREDICTIONS_FILE]


@pytest.mark.parametrize(("limit", "ap"), [(None, 100 / 3), (300, 100), (10, 100 / 3)])
def test_more_than_100_objects_count_if_asked_for(
    limit: int | None, ap: float, tmp_path: Path
) -> None:
    boxes = [[20.0 * (i % 15), 20.0 * (i // 15), 10.0, 10.0] for i in range(300)]
    annotation = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100.0}
    content = {
        "images": [{"id": 1, "height": 400, "width": 300, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {**annotation, "id": i, "bbox": [x, y, w, h], "segmentation": [corners(x, y, w, h)]}
            for i, (x, y, w, h) in enumerate(boxes)
        ],
    }
    file = tmp_path / "cells.json"
    file.write_text(json.dumps(content))
    dataset = register_coco_dataset(str(file), str(tmp_path))
    given = {} if limit is None else {"max_detections": limit}
    evaluator = MaskRCNNCOCOEvaluator(dataset, ("bbox", "segm"), **given)
    results = evaluated(evaluator, dataset)
    # Of the 101 recalls at which COCO reads the precision, 100 / 300 reach the first 34.
    expected = pytest.approx(ap if ap == 100 else 100 * 34 / 101)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == expected
    assert evaluator.max_detections == max(100, limit or 0)


def test_a_data_set_that_is_no_file_is_scored_as_it_is_now(tmp_path: Path) -> None:
    def image(i: int) -> dict[str, Any]:
        box = {"bbox": [1.0, 2.0, 30.0, 40.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        box["keypoints"] = [10.5, 20.5, 2.0] * 17
        return {"image_id": i, "height": 64, "width": 64, "file_name": "", "annotations": [box]}

    name, images = "changing", [image(0)]
    DatasetCatalog.register(name, lambda: images)
    MetadataCatalog.get(name).thing_classes = ["ball"]
    catalogs = DatasetCatalog.list(), MetadataCatalog.list()
    try:
        for n in (1, 5):
            images[:] = [image(i) for i in range(n)]
            evaluator = MaskRCNNCOCOEvaluator(name, ("bbox",), output_dir=str(tmp_path))
            assert len(evaluator._coco_api.imgs) == n
            assert evaluator._coco_api.anns[1]["bbox"] == [1, 2, 30, 40]
        assert images[0]["annotations"][0]["keypoints"][0] == 10.5
        assert (DatasetCatalog.list(), MetadataCatalog.list()) == catalogs
        assert not hasattr(MetadataCatalog.get(name), "json_file")
        assert not list(tmp_path.iterdir())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_file_registered_again_is_scored_as_it_is_now(toy_dataset: Path, tmp_path: Path) -> None:
    content = json.loads((toy_dataset / "val.json").read_text())
    file = tmp_path / "val.json"
    for n in (1, 5):
        file.write_text(json.dumps({**content, "images": content["images"][:n]}))
        dataset = register_coco_dataset(str(file), str(toy_dataset / "val"))
        assert len(MaskRCNNCOCOEvaluator(dataset, ("bbox",))._coco_api.imgs) == n
        assert len(DatasetCatalog.get(dataset)) == n


def test_official_is_pycocotools(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = SimpleNamespace(__version__="1.8.0", COCO=COCO, COCOeval_faster=COCOeval)
    monkeypatch.setattr(average_precision, "COCOeval_opt", COCOeval)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", faster)
    official = f"pycocotools {version('pycocotools')}"
    assert MaskRCNNCOCOEvaluator(dataset, TASKS).backend == "faster-coco-eval 1.8.0"
    assert MaskRCNNCOCOEvaluator(dataset, TASKS, official=True).backend == official
    assert MaskRCNNCOCOEvaluator(dataset, TASKS, use_fast_impl=False).backend == official
    both = MaskRCNNCOCOEvaluator(dataset, TASKS, official=True, use_fast_impl=True)
    assert both.backend == official


def test_an_image_is_kept_as_one_string(dataset: str) -> None:
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS)
    evaluator.reset()
    image = DatasetCatalog.get(dataset)[0]
    instances = perfect_predictions(image)
    evaluator.process([image], [{"instances": instances}])
    (kept,) = evaluator._predictions
    assert kept == {"image_id": image["image_id"], "instances": kept["instances"]}
    assert isinstance(kept["instances"], bytes)
    assert instances.has("pred_masks")  # the caller's


def test_encoded_masks_are_not_decoded(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = next(i for i in DatasetCatalog.get(dataset) if i["annotations"])
    instances = perfect_predictions(image)
    monkeypatch.setattr(RLEMasks, "_decode", lambda rle: pytest.fail("decoded"))
    results = coco_results(instances, image["image_id"])
    assert [r["segmentation"] for r in results] == instances.pred_masks.rles


def test_only_the_images_asked_for_are_scored(dataset: str) -> None:
    images = DatasetCatalog.get(dataset)
    evaluator = MaskRCNNCOCOEvaluator(dataset, ("bbox",))
    evaluator.reset()
    evaluator.process([images[0]], [{"instances": perfect_predictions(images[0])}])
    assert evaluator.evaluate([images[0]["image_id"]])["bbox"]["AP"] == pytest.approx(100)
    assert evaluator.evaluate()["bbox"]["AP"] < 90


def test_no_image_gives_no_results(dataset: str) -> None:
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS)
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_a_class_that_the_dataset_lacks_is_named(dataset: str) -> None:
    image = next(i for i in DatasetCatalog.get(dataset) if i["annotations"])
    instances = perfect_predictions(image)
    instances.pred_classes[0] = 99
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS)
    evaluator.reset()
    classes = len(MetadataCatalog.get(dataset).thing_classes) - 1
    with pytest.raises(ValueError, match=f"class 99,.* 0 to {classes}"):
        evaluator.process([image], [{"instances": instances}])


def test_classes_of_a_dataset_that_was_not_loaded_are_not_taken_for_ids(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """detectron2 learns the ids of its own datasets' categories when it loads them."""
    metadata = MetadataCatalog.get(dataset)
    monkeypatch.delattr(metadata, "thing_dataset_id_to_contiguous_id")
    image = next(i for i in DatasetCatalog.get(dataset) if i["annotations"])
    monkeypatch.delattr(metadata, "thing_dataset_id_to_contiguous_id", raising=False)
    instances = perfect_predictions(image)
    instances.pred_classes[0] = 0  # their ids count from 1
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS)
    evaluator.reset()
    with pytest.raises(ValueError, match="class 0,.* 1 to "):
        evaluator.process([image], [{"instances": instances}])


def test_annotations_without_iscrowd_are_no_crowds(toy_dataset: Path, tmp_path: Path) -> None:
    content = json.loads((toy_dataset / "val.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if not a.pop("iscrowd")]
    file = tmp_path / "plain.json"
    file.write_text(json.dumps(content))
    dataset = register_coco_dataset(str(file), str(toy_dataset / "val"))
    for official in (False, True):
        evaluator = MaskRCNNCOCOEvaluator(dataset, ("segm",), official=official)
        assert evaluated(evaluator, dataset)["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("official", [True, False])
def test_numbers_that_equal_integers_are_integers(
    toy_dataset: Path, tmp_path: Path, official: bool
) -> None:
    content = json.loads((toy_dataset / "val.json").read_text())
    for entry in (e for part in ("images", "annotations", "categories") for e in content[part]):
        for key in ("id", "image_id", "category_id", "iscrowd", "width", "height"):
            if key in entry:
                entry[key] = float(entry[key])
        if entry.get("iscrowd") == 0:
            entry["iscrowd"] = None if entry["id"] % 2 else False
    file = tmp_path / "val.json"
    file.write_text(json.dumps(content))
    dataset = register_coco_dataset(str(file), str(toy_dataset / "val"))
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS, output_dir=str(tmp_path), official=official)
    results = evaluated(evaluator, dataset)
    assert all(results[task]["AP"] == pytest.approx(100) for task in TASKS)

    predictions = json.loads((tmp_path / PREDICTIONS_FILE).read_text())
    assert {type(p[key]) for p in predictions for key in ("image_id", "category_id")} == {int}
    for prediction in predictions:
        prediction |= {key: float(prediction[key]) for key in ("image_id", "category_id")}
    (tmp_path / PREDICTIONS_FILE).write_text(json.dumps(predictions))
    evaluator.read(tmp_path / PREDICTIONS_FILE)
    again = evaluator.evaluate()
    for task in TASKS:
        assert again[task] == pytest.approx(results[task], abs=0, nan_ok=True)


def test_nothing_found_is_0_where_there_is_something_to_find(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    perfect = evaluated(MaskRCNNCOCOEvaluator(dataset, TASKS), dataset)
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS, output_dir=str(tmp_path))
    evaluator.reset()
    images = DatasetCatalog.get(dataset)
    for image in images:
        none = perfect_predictions({**image, "annotations": []})
        evaluator.process([image], [{"instances": none}])
    results = evaluator.evaluate()
    assert f"{len(images)} images" in caplog.text
    assert results["segm"]["AP"] == results["keypoints"]["AP-person"] == 0
    for task in TASKS:
        nothing_to_find = {metric for metric, ap in perfect[task].items() if np.isnan(ap)}
        assert {metric for metric, ap in results[task].items() if np.isnan(ap)} == nothing_to_find
        assert all(ap == 0 for metric, ap in results[task].items() if metric not in nothing_to_find)
    assert np.isnan(results["keypoints"]["AP-circle"])

    file = tmp_path / PREDICTIONS_FILE
    assert file.read_text() == "[]"
    evaluator.read(file)
    again = evaluator.evaluate()
    for task in TASKS:
        assert again[task] == pytest.approx(results[task], abs=0, nan_ok=True)


def test_predictions_of_a_failed_evaluation_are_scored_from_their_file(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluated(MaskRCNNCOCOEvaluator(dataset, TASKS), dataset, shift=2.0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OverflowError("out of bounds")

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate_tasks", fail)
        failing = MaskRCNNCOCOEvaluator(dataset, TASKS, output_dir=str(tmp_path))
        with pytest.raises(ScoringError, match=str(tmp_path / PREDICTIONS_FILE)):
            evaluated(failing, dataset, shift=2.0)

    again = MaskRCNNCOCOEvaluator(dataset, TASKS)
    again.read(tmp_path / PREDICTIONS_FILE)
    results = again.evaluate()
    for task in TASKS:
        assert results[task] == pytest.approx(expected[task], abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 999}, "999"),
        ({"category_id": 999}, "999"),
        ({"category_id": "1"}, "category_id"),
        ({"score": None}, "score"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": None}, "bbox"),
        ({"segmentation": {"size": [3, 4], "counts": "<"}}, r"\[3, 4\]"),
        ({"segmentation": None}, "segmentation"),
        ({"keypoints": [1.0, 2.0, 3.0]}, "keypoints"),
        ({"keypoints": None}, "keypoints"),
    ],
)
def test_a_file_of_other_predictions_is_refused(
    change: dict[str, Any], reason: str, dataset: str, tmp_path: Path
) -> None:
    first = MaskRCNNCOCOEvaluator(dataset, TASKS, output_dir=str(tmp_path))
    evaluated(first, dataset)
    file = tmp_path / PREDICTIONS_FILE
    predictions = json.loads(file.read_text())
    predictions[0] |= change
    predictions[0] = {k: v for k, v in predictions[0].items() if v is not None}
    file.write_text(json.dumps(predictions))
    with pytest.raises(DatasetError, match=rf"{re.escape(str(file))}.*{reason}"):
        first.read(file)


def test_a_test_set_without_annotations_gives_a_submission(
    toy_dataset: Path, tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "val.json").read_text())
    annotations = content.pop("annotations")
    file = tmp_path / "image_info_test-dev2017.json"
    file.write_text(json.dumps(content))
    dataset = register_coco_dataset(str(file), str(toy_dataset / "val"))
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    images = DatasetCatalog.get(dataset)
    for image in images:
        found = perfect_predictions({**image, "annotations": []})
        evaluator.process([image], [{"instances": found}])
    assert annotations
    results = evaluator.evaluate()
    assert results == {}
    print_csv_format(results)  # as detectron2's scripts do
    files = sorted(f.name for f in (tmp_path / "out").rglob("*.*"))
    assert files == [
        PREDICTIONS_FILE,
        *["detections_test-dev2017_mask-rcnn_results.zip"] * 2,
        "person_keypoints_test-dev2017_mask-rcnn_results.zip",
    ]


def test_keypoint_task_needs_keypoints_and_sigmas(tmp_path: Path) -> None:
    def register(category: dict[str, Any]) -> str:
        file = tmp_path / f"{category['name']}.json"
        file.write_text(json.dumps({"images": [], "annotations": [], "categories": [category]}))
        return register_coco_dataset(str(file), str(tmp_path))

    with pytest.raises(ValueError, match="has no keypoints to evaluate"):
        MaskRCNNCOCOEvaluator(register({"id": 1, "name": "ball"}), ("keypoints",))
    fish = register({"id": 1, "name": "fish", "keypoints": ["head", "tail"]})
    with pytest.raises(ValueError, match="'keypoint_sigmas' in the category"):
        MaskRCNNCOCOEvaluator(fish, ("keypoints",))
    with pytest.raises(ValueError, match=r"kpt_oks_sigmas has 3 values.* has 2 keypoints"):
        MaskRCNNCOCOEvaluator(fish, ("keypoints",), kpt_oks_sigmas=[0.1] * 3)
    MaskRCNNCOCOEvaluator(fish, ("keypoints",), kpt_oks_sigmas=[0.1, 0.1])
    sized = {"id": 1, "name": "whale", "keypoints": ["head"], "keypoint_sigmas": [0.3]}
    assert keypoint_oks_sigmas(register(sized)) == [0.3]
