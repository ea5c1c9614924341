import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.evaluation.pictures import draw_prediction, draw_predictions, draw_truth


@pytest.fixture
def dataset(toy_dataset: Path) -> str:
    return register_coco_dataset(str(toy_dataset / "val.json"), str(toy_dataset / "val"))


def pictures(dataset: str, folder: Path, predictions: list[dict], count: int) -> list[Path]:
    file = folder / "predictions.json"
    file.write_text(json.dumps(predictions))
    np.random.seed(0)  # detectron2's visualizer draws its colours
    images, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    return draw_predictions(images, metadata, file, folder / "pictures", count)


def prediction(score: float, **fields: object) -> dict:
    given = {"image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 30], "score": score}
    return {**given, **fields}


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


def test_where_nothing_reaches_the_score_the_best_is_named(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(dataset, tmp_path, [prediction(0.9)], 1)
    assert not caplog.records
    pictures(dataset, tmp_path, [prediction(0.25), prediction(0.125)], 1)
    (record,) = caplog.records
    assert "0.5" in record.getMessage()
    assert "0.25" in record.getMessage()
    pictures(dataset, tmp_path, [], 1)
    assert len(caplog.records) == 2


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


def test_masks_and_keypoints_are_drawn_as_detectron2_draws_a_models(dataset: str) -> None:
    image, metadata = DatasetCatalog.get(dataset)[0], MetadataCatalog.get(dataset)
    height, width = image["height"], image["width"]
    bitmaps = torch.zeros(2, height, width, dtype=torch.bool)
    bitmaps[0, 10:40, 10:50], bitmaps[1, 20:60, 5:30] = True, True
    keypoints = torch.tensor([[12.0, 12, 0.9]] * 17)
    boxes = [[10, 10, 40, 30], [5, 20, 25, 40]]
    rles = [coco_mask.encode(np.asfortranarray(b.numpy().astype(np.uint8))) for b in bitmaps]
    flat = keypoints.flatten().tolist()
    predictions = [
        prediction(score, category_id=1, bbox=box, segmentation=rle, keypoints=flat)
        for score, box, rle in zip([0.6, 0.9], boxes, rles)
    ]
    np.random.seed(0)
    picture = draw_prediction(image, predictions, metadata)

    instances = Instances(
        (height, width),
        pred_boxes=Boxes(torch.tensor([[10.0, 10, 50, 40], [5, 20, 30, 60]])),
        scores=torch.tensor([0.6, 0.9]),
        pred_classes=torch.zeros(2, dtype=torch.int64),
        pred_masks=bitmaps,
        pred_keypoints=(keypoints + torch.tensor([0.5, 0.5, 0])).expand(2, 17, 3),
    )
    np.random.seed(0)
    pixels = read_image(image["file_name"], format="RGB")
    visualizer = Visualizer(pixels, metadata, scale=picture.shape[0] / height)
    assert np.array_equal(picture, visualizer.draw_instance_predictions(instances).get_image())


def test_a_dataset_of_a_function_with_class_names_alone_is_drawn(
    dataset: str, tmp_path: Path
) -> None:
    records = [r for r in DatasetCatalog.get(dataset) if "keypoints" in str(r)]
    found = prediction(0.9, image_id=records[0]["image_id"])
    DatasetCatalog.register("of a function", lambda: records)
    MetadataCatalog.get("of a function").thing_classes = MetadataCatalog.get(dataset).thing_classes
    try:
        before, after = (
            cv2.imread(str(pictures("of a function", tmp_path, predictions, 1)[0])).astype(int)
            for predictions in ([], [found])
        )
    finally:
        DatasetCatalog.remove("of a function")
        MetadataCatalog.remove("of a function")
    half = before.shape[1] // 2
    assert np.abs(after - before)[:, : half - 8].max() == 0
    assert np.abs(after - before)[:, half:].max() > 50


def test_no_more_pictures_than_images(dataset: str, tmp_path: Path) -> None:
    assert len(pictures(dataset, tmp_path, [], 100)) == 6


@pytest.mark.parametrize("empty", [None, []])
def test_instances_without_keypoints_or_a_mask_are_drawn(dataset: str, empty: list | None) -> None:
    metadata = MetadataCatalog.get(dataset)
    image = DatasetCatalog.get(dataset)[0]
    box = {"bbox": [5, 5, 40, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    points = {"keypoints": [20.0, 20.0, 2] * 17}
    mask = {"segmentation": [[8.0, 8, 40, 8, 40, 40]]}

    def draw(*annotations: dict) -> np.ndarray:
        np.random.seed(0)
        return draw_truth({**image, "annotations": list(annotations)}, metadata)

    for kind, field in ((points, "keypoints"), (mask, "segmentation")):
        full, bare = {**box, **kind}, {**box, field: empty}
        for first, second in ((full, bare), (bare, full)):
            drawn = draw(first, second)
            absent = [box if a is bare else a for a in (first, second)]
            assert np.array_equal(drawn, draw(*absent))
            assert not np.array_equal(drawn, draw(bare, bare))
        assert np.array_equal(draw(bare, bare), draw(box, box))


def test_an_image_is_drawn_as_the_model_sees_it(dataset: str, tmp_path: Path) -> None:
    """Of 16 bits the upper 8."""
    file = str(tmp_path / "deep.png")
    cv2.imwrite(file, np.full((480, 480), 0x4000, np.uint16))
    image = {"file_name": file, "image_id": 1, "height": 480, "width": 480}
    assert (draw_truth(image, MetadataCatalog.get(dataset)) == 0x40).all()
