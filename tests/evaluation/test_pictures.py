import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.evaluation.pictures import draw_predictions


@pytest.fixture
def dataset(toy_dataset: Path) -> str:
    return register_coco_dataset(str(toy_dataset / "val.json"), str(toy_dataset / "val"))


def pictures(dataset: str, folder: Path, predictions: list[dict], count: int) -> list[Path]:
    file = folder / "predictions.json"
    file.write_text(json.dumps(predictions))
    np.random.seed(0)  # detectron2's visualizer draws its colours
    return draw_predictions([dataset], file, folder / "pictures", count)


def prediction(score: float, **fields: object) -> dict:
    return {"image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 30], "score": score, **fields}


def test_truth_is_left_and_predictions_right(dataset: str, tmp_path: Path) -> None:
    (empty,) = pictures(dataset, tmp_path, [], 1)
    before = cv2.imread(str(empty)).astype(int)
    (drawn,) = pictures(dataset, tmp_path, [prediction(0.9)], 1)
    after = cv2.imread(str(drawn)).astype(int)
    half = before.shape[1] // 2
    assert np.abs(after - before)[:, : half - 8].max() == 0
    assert np.abs(after - before)[:, half:].max() > 50


def test_low_scores_are_left_out(dataset: str, tmp_path: Path) -> None:
    (empty,) = pictures(dataset, tmp_path, [], 1)
    before = empty.read_bytes()
    (drawn,) = pictures(dataset, tmp_path, [prediction(0.4)], 1)
    assert drawn.read_bytes() == before


def test_keypoints_of_a_category_without_keypoints_are_not_drawn(
    dataset: str, tmp_path: Path
) -> None:
    keypoints = [12.0, 12.0, 0.9] * 17
    (ball,) = pictures(dataset, tmp_path, [prediction(0.9)], 1)
    without = ball.read_bytes()
    (ball,) = pictures(dataset, tmp_path, [prediction(0.9, keypoints=keypoints)], 1)
    assert ball.read_bytes() == without
    person = [prediction(0.9, keypoints=keypoints) | {"category_id": 1}]
    (drawn,) = pictures(dataset, tmp_path, person, 1)
    assert drawn.read_bytes() != without


def test_no_more_pictures_than_images(dataset: str, tmp_path: Path) -> None:
    assert len(pictures(dataset, tmp_path, [], 100)) == 6
