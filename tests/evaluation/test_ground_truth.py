"""Annotations that predictions cannot be compared to."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog
from pycocotools.coco import COCO

from mask_rcnn_plugin.data.coco import DatasetError, register_coco_dataset
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator
from mask_rcnn_plugin.evaluation.ground_truth import check_ground_truth

SOUND = {
    **{"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0},
    "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]],
}
TASKS = ("bbox", "segm")


def coco(*annotations: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 6}],
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "a", "keypoints": ["x"], "keypoint_sigmas": [0.1]}],
    }
    coco.createIndex()
    return coco


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        # On the next two faster-coco-eval never returns.
        ({"segmentation": {"size": [6, 8], "counts": [9]}}, "RLE counts sum to 9"),
        ({"segmentation": {"size": [6, 8], "counts": [48, 48]}}, "RLE counts sum to 96"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "RLE size is"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": None, "iscrowd": 1}, "no segmentation"),
        ({"segmentation": [[1, 1, 5, 1, math.nan, 5]]}, "not finite"),
        ({"segmentation": [[1, 1, 5, 1, 1e300, 5]]}, "far outside"),
        ({"bbox": [1, 1, 4]}, "must be 4 numbers"),
        ({"area": None}, "area is None, must be a number"),
        ({"area": math.nan}, "area is nan"),
        ({"iscrowd": -(2**63)}, "iscrowd is -9223372036854775808, must be 0 or 1"),
        ({"segmentation": [*SOUND["segmentation"], []]}, "polygon has 0 points"),
    ],
)
def test_what_cannot_be_scored_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(DatasetError, match=f"1 annotations of the test set 'mine' .* {reason}"):
        check_ground_truth("mine", coco(SOUND, SOUND | {"id": 6} | fields), TASKS)


@pytest.mark.parametrize(
    "fields",
    [
        {"bbox": [1, 1, 0, 4]},
        {"bbox": [90, 1, 4, 4]},
        {"segmentation": {"size": [6, 8], "counts": [48]}},
        {"image_id": 9, "bbox": None},  # of no image
        {"keypoints": [1]},  # not scored
        {"id": "x"},
        {"id": 10**400},
    ],
)
def test_objects_that_nothing_matches_are_scored(fields: dict[str, Any]) -> None:
    check_ground_truth("mine", coco(SOUND | fields), TASKS)


def test_only_what_a_task_needs_is_looked_at() -> None:
    check_ground_truth("mine", coco(SOUND | {"segmentation": 5}), ["bbox"])
    with pytest.raises(DatasetError, match="keypoints are 2 numbers, must be 3 x 1"):
        check_ground_truth("mine", coco(SOUND | {"keypoints": [1, 2]}), ["keypoints"], 1)


def test_the_evaluator_refuses_such_a_set_before_the_model_runs(tmp_path: Path) -> None:
    file = tmp_path / "val.json"
    file.write_text(json.dumps(coco(SOUND | {"area": "16"}).dataset))
    name = register_coco_dataset(str(file), str(tmp_path))
    with pytest.raises(DatasetError, match=r"val\.json' cannot be scored, .* id 5: area is '16'"):
        MaskRCNNCOCOEvaluator(name, TASKS, distributed=False)


def test_keypoints_are_counted_where_their_number_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "val.json"
    annotations = [
        SOUND | {"id": id_, "keypoints": keypoints}
        for id_, keypoints in (
            (5, [2, 2, 1]),
            (6, [0, 0, 0]),
            (7, None),
            (8, []),
            (9, [2**64, 2, 1]),
        )
    ]
    annotations.append(SOUND | {"id": 10, "image_id": 9, "keypoints": "of no image"})
    file.write_text(json.dumps(coco(*annotations).dataset))
    name = register_coco_dataset(str(file), str(tmp_path))
    DatasetCatalog.get(name)
    evaluator = MaskRCNNCOCOEvaluator(name, ("keypoints",), distributed=False)
    found = {"image_id": 1, "category_id": 1, "score": 1, "bbox": [1, 1, 4, 4]}
    (tmp_path / "found.json").write_text(json.dumps([{**found, "keypoints": [2, 2, 1]}]))
    evaluator.read(tmp_path / "found.json")
    # One of two objects: of COCO's 101 recalls, 51 are reached.
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(100 * 51 / 101)


def test_masks_of_more_pixels_than_coco_counts_are_refused() -> None:
    large = coco(SOUND)
    large.imgs[1] |= {"width": 66_000, "height": 66_000}
    check_ground_truth("mine", large, ["bbox"])
    with pytest.raises(DatasetError, match="66000 x 66000"):
        check_ground_truth("mine", large, TASKS)
