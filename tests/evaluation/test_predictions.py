"""Predictions in COCO's results format: packed, on disk, and for COCO's server."""

import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.evaluation.predictions import (
    iterate_predictions,
    pack,
    read_predictions,
    unpack,
    write_predictions,
    write_submissions,
)


def predictions(image_id: int, count: int) -> list[dict[str, Any]]:
    rle = {"size": [480, 640], "counts": "PVo35i>2O1O00001O00001O0000000000001O00000O1000000O1O1O1"}
    return [
        {
            **{"image_id": image_id, "category_id": 1, "score": 0.123456 + i, "segmentation": rle},
            **{"bbox": [1.26 + i, 2, 3, 4], "keypoints": [1.04, 2.06, 0.5]},
        }
        for i in range(count)
    ]


IMAGES = [predictions(7, 40), [], predictions(3, 2)]


def test_packed_predictions_are_small_and_come_back_whole(tmp_path: Path) -> None:
    packed = [pack(image) for image in IMAGES]
    assert [unpack(image) for image in packed] == IMAGES
    everything = [p for image in IMAGES for p in image]
    assert sum(map(len, packed)) < 0.5 * len(json.dumps(everything))
    file = tmp_path / "new" / "file.json"
    write_predictions(file, packed)
    assert file.read_text() == json.dumps(everything)
    assert read_predictions(file) == {7: IMAGES[0], 3: IMAGES[2]}
    write_predictions(tmp_path / "none.json", [pack([]), pack([])])
    assert (tmp_path / "none.json").read_text() == "[]"


def test_predictions_are_read_one_at_a_time(tmp_path: Path) -> None:
    """None but those that are wanted stay in memory."""
    file = tmp_path / "file.json"
    write_predictions(file, [pack(predictions(i, 100)) for i in range(40)])
    tracemalloc.start()
    try:
        best = max(p["score"] for p in iterate_predictions(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert best == pytest.approx(99.123456)
    assert peak < 0.6 * file.stat().st_size


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '[{"image_id": 1}]'])
def test_a_file_of_something_else_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    with pytest.raises(DatasetError, match=r"file\.json"):
        read_predictions(file)


def test_submissions_are_what_cocos_server_takes(tmp_path: Path) -> None:
    tasks = ("bbox", "segm", "keypoints")
    packed = [pack(image) for image in IMAGES]
    files = write_submissions(tmp_path, packed, "test-dev2017", tasks)
    rle = IMAGES[0][0]["segmentation"]
    for file, task, kind, fields in zip(
        files,
        tasks,
        ["detections", "detections", "person_keypoints"],
        [{"bbox": [1.3, 2, 3, 4]}, {"segmentation": rle}, {"keypoints": [1.0, 2.1, 0.5]}],
        strict=True,
    ):
        name = f"{kind}_test-dev2017_mask-rcnn_results"
        assert file == tmp_path / task / f"{name}.zip"
        with zipfile.ZipFile(file) as archive:
            assert archive.namelist() == [f"{name}.json"]
            first, *others = json.loads(archive.read(f"{name}.json"))
        assert first == {"image_id": 7, "category_id": 1, "score": 0.123456, **fields}
        assert len(others) == 41
