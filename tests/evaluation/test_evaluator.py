"""Evaluation: the numbers are COCO's, whatever form the predictions come in."""

import json
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.evaluation import (
    PREDICTIONS_FILE,
    MaskRCNNCOCOEvaluator,
    average_precision,
    coco_results,
    keypoint_oks_sigmas,
    results_table,
    write_results,
    write_submissions,
)
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
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS, str(tmp_path))
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
        *(dataset, ("bbox", "segm"), str(ours)), official=official, max_dets_per_image=limit
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


@pytest.mark.parametrize(("limit", "ap"), [(None, 66.3), (150, 100), (300, 100), (10, 66.3)])
@pytest.mark.parametrize("backend", ["fastest", "official"])
def test_more_than_100_objects_count_if_asked_for(
    backend: str, limit: int | None, ap: float, tmp_path: Path
) -> None:
    boxes = [[20.0 * (i % 15), 20.0 * (i // 15), 10.0, 10.0] for i in range(150)]
    annotation = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100.0}
    content = {
        "images": [{"id": 1, "height": 300, "width": 300, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{**annotation, "id": i + 1, "bbox": b} for i, b in enumerate(boxes)],
    }
    file = tmp_path / "cells.json"
    file.write_text(json.dumps(content))
    dataset = register_coco_dataset(str(file), str(tmp_path))
    instances = Instances((300, 300))
    instances.pred_boxes = Boxes(BoxMode.convert(torch.tensor(boxes), 1, 0))
    instances.scores = torch.linspace(1, 0.5, 150)
    instances.pred_classes = torch.zeros(150, dtype=torch.long)
    given = {} if limit is None else {"max_detections": limit}
    evaluator = MaskRCNNCOCOEvaluator(dataset, ("bbox",), official=backend == "official", **given)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    # Of the 101 recalls at which COCO reads the precision, 100 / 150 reach the first 67.
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(ap, abs=0.05)
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
            evaluator = MaskRCNNCOCOEvaluator(name, ("bbox",), str(tmp_path))
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
    with pytest.raises(ValueError, match=f"class 99, but the dataset's classes are 0 to {classes}"):
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


def test_no_predictions_give_nan_for_every_task(dataset: str) -> None:
    evaluator = MaskRCNNCOCOEvaluator(dataset, TASKS)
    evaluator.reset()
    for image in DatasetCatalog.get(dataset):
        none = perfect_predictions({**image, "annotations": []})
        evaluator.process([image], [{"instances": none}])
    results = evaluator.evaluate()
    assert set(results) == set(TASKS)
    assert np.isnan(results["segm"]["AP"])


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


def test_results_file_has_null_for_what_could_not_be_computed(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "results.json"
    metrics = {"AP": 12.5, "APl": float("nan")}
    write_results(file, "set", {"bbox": metrics}, "pycocotools 2", ms_per_image=3.14159)
    assert json.loads(file.read_text()) == {
        "dataset": "set",
        "bbox": {"AP": 12.5, "APl": None},
        "evaluator": "pycocotools 2",
        "ms_per_image": 3.14,
    }


def test_results_file_names_another_limit_than_cocos(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", "set", {}, "pycocotools 2", 1.0, max_detections=300)
    assert json.loads((tmp_path / "results.json").read_text())["max_detections"] == 300


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_table_leaves_out_what_a_task_has_not() -> None:
    metrics = {"AP": 12.34, "AP50": 50.0, "AP75": 5.0, "APm": 1.0, "APl": 2.0}
    table = results_table({"keypoints": metrics})
    assert cells(table.splitlines()[2]) == ["keypoints", "12.3", "50.0", "5.0", "", "1.0", "2.0"]


def test_results_table_has_the_papers_values_below_ours() -> None:
    ours = {"bbox": {"AP": 1.0, "AP50": 2.0}, "segm": {"AP": 3.0}}
    table = results_table(ours, {"segm": {"AP": 30.3, "AP75": 31.5}, "keypoints": {"AP": 9.0}})
    assert [cells(line)[:4] for line in table.splitlines()[2:]] == [
        ["bbox", "1.0", "2.0", ""],
        ["segm", "3.0", "", ""],
        ["segm (paper)", "30.3", "", "31.5"],
    ]


def test_submissions_are_what_cocos_server_takes(tmp_path: Path) -> None:
    images = tmp_path / "image_info_test-dev2017.json"
    images.write_text(json.dumps({"images": [], "categories": [{"id": 1, "name": "person"}]}))
    dataset = register_coco_dataset(str(images), str(tmp_path))
    rle = {"size": [9, 9], "counts": "0o1"}
    prediction = {
        **{"image_id": 7, "category_id": 1, "score": 0.123456, "segmentation": rle},
        **{"bbox": [1.26, 2, 3, 4], "keypoints": [1.04, 2.06, 0.5]},
    }
    (tmp_path / PREDICTIONS_FILE).write_text(json.dumps([prediction]))
    files = write_submissions(tmp_path / PREDICTIONS_FILE, dataset, TASKS)

    common = {"image_id": 7, "category_id": 1, "score": 0.123456}
    for file, task, kind, fields in zip(
        files,
        TASKS,
        ["detections", "detections", "person_keypoints"],
        [{"bbox": [1.3, 2, 3, 4]}, {"segmentation": rle}, {"keypoints": [1.0, 2.1, 0.5]}],
        strict=True,
    ):
        name = f"{kind}_test-dev2017_mask-rcnn_results"
        assert file == tmp_path / "submission" / task / f"{name}.zip"
        with zipfile.ZipFile(file) as archive:
            assert archive.namelist() == [f"{name}.json"]
            assert json.loads(archive.read(f"{name}.json")) == [{**common, **fields}]
