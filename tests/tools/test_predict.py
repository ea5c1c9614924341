"""tools/predict.py, from photos to pictures and COCO's format."""

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import VisImage
from PIL import Image

from mask_rcnn_plugin.evaluation.predictions import read_predictions
from mask_rcnn_plugin.inference.result import Result

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def predict(run_python: Run, trained: Path, tmp_path: Path) -> Run:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        program = REPOSITORY / "tools" / "predict.py"
        output = ["--weights", trained, "--output", tmp_path / "out"]
        return run_python(program, *output, *args, cwd=tmp_path)

    return run


def test_predictions_score_as_the_evaluation_does(
    predict: Run, run_python: Run, trained: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    done = predict("--input", toy_dataset / "val", "--confidence-threshold", 0)
    assert done.returncode == 0, done.stderr
    assert "120 detections in 6 images" in done.stdout
    assert "6 images with 20 detections, as many as dataset.test.max_detections" in done.stdout
    assert len(list((tmp_path / "out" / "pictures").glob("*.jpg"))) == 6

    # Ground truth is a part of what was found, so that there is something to score.
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    best = max(detection["score"] for detection in found)
    again = predict("--input", toy_dataset / "val", "--confidence-threshold", best)
    assert "as many as" not in again.stdout  # what else there is would not be drawn
    truth = json.loads((toy_dataset / "val.json").read_text())
    ids = {image["file_name"]: 50 - image["id"] for image in truth["images"]}
    truth["images"] = [{**image, "id": ids[image["file_name"]]} for image in truth["images"]]
    truth["annotations"] = [
        {**f, "id": i, "image_id": ids[f["file_name"]], "area": f["bbox"][2] * f["bbox"][3]}
        for i, f in enumerate(found)
        if i % 3 == 0
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    both = []
    for source in (
        ["--weights", trained, "--output", tmp_path / "weights"],
        ["--predictions", tmp_path / "out" / "predictions.json", "--output", tmp_path / "file"],
    ):
        args = ["--config-file", trained, *source, "--visualize", 1]
        args.append(f"dataset.test.json={tmp_path / 'truth.json'}")
        scored = run_python(REPOSITORY / "eval.py", *args, cwd=tmp_path)
        assert scored.returncode == 0, scored.stderr
        both.append(json.loads((Path(source[-1]) / "results.json").read_text()))
    for task in ("bbox", "segm"):
        assert both[0][task] == both[1][task]
        assert 5 < both[0][task]["AP"] < 95
    folders = [tmp_path / name / "pictures" for name in ("weights", "file")]
    pictures = [[p.read_bytes() for p in folder.iterdir()] for folder in folders]
    assert pictures[0] == pictures[1]


def test_a_broken_photo_costs_a_line(predict: Run, toy_dataset: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for name in ("a.jpg", "more/b.jpg", "more/d.JPG"):
        shutil.copy(toy_dataset / "val" / "000000.jpg", photos / name)
    cv2.imwrite(str(photos / "a.png"), cv2.imread(str(photos / "a.jpg")))
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image either")
    done = predict("--input", photos, "--batch-size", 3, "--confidence-threshold", 1)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "broken.jpg" in line]
    assert "Traceback" not in done.stderr
    assert "in 4 images" in done.stdout
    assert "1 of 5 files" in done.stdout
    assert "nothing reaches --confidence-threshold 1.0: the best score is" in done.stdout
    names = {"a.jpg", "a.png.jpg", "more/b.jpg", "more/d.jpg"}
    pictures = tmp_path / "out" / "pictures"
    assert {p.relative_to(pictures).as_posix() for p in pictures.rglob("*.jpg")} == names
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {f["file_name"] for f in found} == {"a.jpg", "a.png", "more/b.jpg", "more/d.JPG"}
    assert {f["image_id"] for f in found} == {1, 2, 3, 4}
    assert all(f["category_name"] for f in found)


def test_files_and_patterns(predict: Run, toy_dataset: Path, tmp_path: Path) -> None:
    val = toy_dataset / "val"
    done = predict("--input", val / "000001.jpg", val / "00000[34].jpg", val / "000003.jpg")
    assert done.returncode == 0, done.stderr
    pictures = sorted(p.name for p in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["000001.jpg", "000003.jpg", "000004.jpg"]
    assert "pictures already" not in done.stdout
    assert "pictures already" in predict("--input", val / "000002.jpg").stdout


def test_a_video_becomes_one(predict: Run, toy_dataset: Path, tmp_path: Path) -> None:
    film = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 64))
    for i in range(3):
        writer.write(cv2.imread(str(toy_dataset / "val" / f"00000{i}.jpg")))
    writer.release()
    done = predict("--video-input", film, "--confidence-threshold", "0.1")
    assert done.returncode == 0, done.stderr
    video = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    frames = [video.read()[1] for _ in range(3)]
    assert not video.read()[0]
    assert video.get(cv2.CAP_PROP_FPS) == 5
    original = cv2.imread(str(toy_dataset / "val" / "000000.jpg"))
    assert frames[0].shape == original.shape
    assert not np.allclose(frames[0], original, atol=60)  # something is drawn
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {f"film.mp4#{i:06d}": i for i in (1, 2, 3)}  # each frame is an image of its own
    assert {f["file_name"]: f["image_id"] for f in found} == names
    read = read_predictions(tmp_path / "out" / "predictions.json")
    assert read.keys() == names.keys()


def test_keypoints_of_a_class_without_them_are_not_drawn_in_a_video(
    toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a photo: what a model predicts of any detection says nothing there."""
    predict = importlib.import_module("predict")
    metadata = Metadata(
        name="model",
        thing_classes=["person", "ball"],
        keypoint_classes=["person"],
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
    )
    instances = Instances(
        (64, 64),
        pred_boxes=Boxes(torch.tensor([[5.0, 5, 30, 30], [20, 20, 60, 60]])),
        scores=torch.tensor([0.9, 0.9]),
        pred_classes=torch.tensor([0, 1]),
        pred_keypoints=torch.rand(2, 17, 3) * 20 + 5,
    )
    keypoints = instances.pred_keypoints.clone()  # detectron2's conversion to COCO's moves them
    seen = []

    def draw(self: Any, pixels: np.ndarray, drawn: Instances) -> VisImage:
        seen.append(drawn.pred_keypoints.clone())
        return VisImage(pixels)

    monkeypatch.setattr(predict.VideoVisualizer, "draw_instance_predictions", draw)
    film = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 64))
    writer.write(cv2.imread(str(toy_dataset / "val" / "000000.jpg")))
    writer.release()

    def predictor(pixels: np.ndarray) -> Result:
        return Result(Image.fromarray(pixels), instances, metadata)

    predictor.metadata = metadata  # type: ignore[attr-defined]
    video = predict.open_video(film)
    list(predict.predict_video(predictor, video, tmp_path / "film.mp4", 0.5))
    (drawn,) = seen
    assert torch.equal(drawn[0], keypoints[0])
    assert not drawn[1].any()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--input", "no*.jpg"], "no*.jpg"),
        (["--input", "."], "'.'"),
        (["--input", "dataset.test.max_detections=1"], "has no file"),
        (["--video-input", "no.mp4"], "no.mp4"),
        (["--input", ".", "--weights", "nowhere"], "nowhere"),
        (["--input", __file__, "train.max_itre=1"], "max_iter"),
        ([], "--input"),
    ],
)
def test_mistakes_are_one_line(args: list[str], named: str, predict: Run, tmp_path: Path) -> None:
    done = predict(*args)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("predictions.json"))


def test_what_is_read_is_not_written_over(predict: Run, toy_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    photo = Path(shutil.copy(toy_dataset / "val" / "000000.jpg", tmp_path / "out" / "pictures"))
    film = tmp_path / "out" / "film.mp4"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (64, 64))
    writer.write(cv2.imread(str(photo)))
    writer.release()
    before = photo.read_bytes(), film.read_bytes()
    for source in (["--input", tmp_path / "out"], ["--video-input", film]):
        done = predict(*source)
        assert done.returncode == 2
        assert "--output" in done.stderr.splitlines()[-1]
    assert (photo.read_bytes(), film.read_bytes()) == before


def test_an_odd_photo_costs_a_line_too(predict: Run, toy_dataset: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "line.png"), np.zeros((1, 3000, 3), np.uint8))
    shutil.copy(toy_dataset / "val" / "000000.jpg", tmp_path / "photo.jpg")
    done = predict("--input", tmp_path / "line.png", tmp_path / "photo.jpg", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "line.png: its 3000 x 1 pixels" in done.stderr
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {f["file_name"] for f in found} == {"photo.jpg"}


def test_nothing_readable_is_a_failure(predict: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"")
    done = predict("--input", tmp_path / "broken.jpg")
    assert done.returncode == 1
    assert "0 images" in done.stdout
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == []
