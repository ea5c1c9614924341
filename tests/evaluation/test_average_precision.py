"""AP is COCO's to the last digits, whatever computes it, and however the predictions are kept."""

import copy
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from benchmark.made_up_detections import made_up_ground_truth, made_up_predictions
from mask_rcnn_plugin.evaluation import average_precision, coco_results
from mask_rcnn_plugin.evaluation.average_precision import (
    Backend,
    Detections,
    evaluate_task,
    find_backend,
    pack,
    unpack,
    write_predictions,
)

TASKS = ("bbox", "segm", "keypoints")
KEYPOINTS = 5
SIGMAS = [0.1, 0.2, 0.3, 0.15, 0.25]


def with_keypoints(rng: np.random.Generator, item: dict[str, Any], annotated: bool) -> None:
    """Five keypoints in the item's box; an annotated item may have invisible ones, or none."""
    x, y, width, height = item["bbox"]
    places = (x, y) + (0.2, 0.3) * np.array([width, height]) * np.arange(1, KEYPOINTS + 1)[:, None]
    places += rng.normal(0, 0.05 * width, size=places.shape)
    last = rng.integers(0, 3, KEYPOINTS) if annotated else rng.random(KEYPOINTS)
    if annotated and item["id"] % 5 == 0:
        last[:] = 0
    item["keypoints"] = np.concatenate([places, last[:, None]], axis=1).ravel().tolist()
    if annotated:
        item["num_keypoints"] = int((last > 0).sum())


@pytest.fixture(scope="module")
def ground_truth() -> dict[str, Any]:
    """40 images, some without an object; crowds; a category without any object."""
    content = made_up_ground_truth(images=40, objects=300, categories=12, seed=3)
    rng = np.random.default_rng(0)
    for i, annotation in enumerate(content["annotations"]):
        if annotation["category_id"] == 5:
            annotation["category_id"] = 7
        if i % 15 == 0 and not annotation["iscrowd"]:
            annotation["iscrowd"] = 1  # with polygons
        with_keypoints(rng, annotation, annotated=True)
    assert {a["image_id"] for a in content["annotations"]} < {i["id"] for i in content["images"]}
    assert any(isinstance(a["segmentation"], dict) for a in content["annotations"])
    return content


@pytest.fixture(scope="module")
def predictions(ground_truth: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Of each image; none in every seventh. Scores have ties."""
    rng = np.random.default_rng(1)
    images = []
    for i, (image, output) in enumerate(made_up_predictions(ground_truth, detections=60)):
        results = coco_results(output["instances"], image["image_id"]) if i % 7 else []
        for result in results:
            result["category_id"] = 2 * result["category_id"] + 1
            result["score"] = round(result["score"], 2)
            with_keypoints(rng, result, annotated=False)
        images.append(results)
    return images


def backends(ground_truth: dict[str, Any]) -> list[Backend]:
    """Official and fastest."""
    return [find_backend(ground_truth, official=True), find_backend(ground_truth)]


def plain(
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    max_dets: list[int],
    image_ids: list[int] | None = None,
) -> Any:
    """pycocotools as its own documentation uses it."""
    coco = COCO()
    coco.dataset = copy.deepcopy(ground_truth)
    coco.createIndex()
    results = [copy.deepcopy(p) for image in predictions for p in image]
    if task == "segm":
        for result in results:
            del result["bbox"]
    coco_eval = average_precision.COCOeval(coco, coco.loadRes(results), task)
    if task == "keypoints":
        coco_eval.params.kpt_oks_sigmas = np.array(SIGMAS)
    else:
        coco_eval.params.maxDets = max_dets
    if image_ids:
        coco_eval.params.imgIds = image_ids
    coco_eval.evaluate()
    coco_eval.accumulate()
    if max_dets[2] == 100:
        coco_eval.summarize()
    return coco_eval


def scored(
    backend: Backend,
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    max_dets: list[int],
    image_ids: list[int] | None = None,
) -> SimpleNamespace:
    ground_truth = copy.deepcopy(ground_truth)
    detections = Detections([pack(image) for image in predictions], [task], ground_truth)
    return evaluate_task(backend, ground_truth, detections, task, max_dets, SIGMAS, image_ids)


@pytest.mark.parametrize("group_size", [1, 300, 10**6])
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_every_backend_gives_the_numbers_of_pycocotools(
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    official: bool,
    group_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(average_precision, "GROUP_SIZE", group_size)
    backend = find_backend(ground_truth, official)
    ours = scored(backend, ground_truth, predictions, task, [1, 10, 100])
    theirs = plain(ground_truth, predictions, task, [1, 10, 100])
    assert 0.05 < theirs.stats[0] < 0.95
    assert len(ours.stats) == len(theirs.stats) == (10 if task == "keypoints" else 12)
    for key in ("precision", "recall"):
        np.testing.assert_allclose(ours.eval[key], theirs.eval[key], rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.stats, theirs.stats, rtol=0, atol=1e-10)


@pytest.mark.parametrize("max_dets", [[1, 10, 5], [1, 10, 300], [1, 2, 3]])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_other_limits_and_chosen_images_give_the_same(
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    max_dets: list[int],
) -> None:
    some = [2, 3, 8, 9, 30]
    theirs = plain(ground_truth, predictions, task, list(max_dets), some)
    for backend in backends(ground_truth):
        ours = scored(backend, ground_truth, predictions, task, list(max_dets), some)
        for key in ("precision", "recall"):
            np.testing.assert_allclose(ours.eval[key], theirs.eval[key], rtol=0, atol=1e-10)
        highest = theirs.eval["precision"][:, :, :, 0, -1]
        assert ours.stats[0] == pytest.approx(highest[highest > -1].mean(), abs=1e-10)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_to_find_is_minus_one_and_nothing_found_is_zero(
    ground_truth: dict[str, Any], predictions: list[list[dict[str, Any]]], task: str
) -> None:
    empty = {**ground_truth, "annotations": []}
    (category,) = {ground_truth["annotations"][0]["category_id"]}
    wrong = [[{**p, "category_id": 5} for p in image] for image in predictions]
    for backend in backends(ground_truth):
        assert set(scored(backend, empty, predictions, task, [1, 10, 100]).stats) == {-1}
        stats = scored(backend, ground_truth, wrong, task, [1, 10, 100]).stats
        theirs = plain(ground_truth, wrong, task, [1, 10, 100]).stats
        np.testing.assert_array_equal(stats, theirs)
        assert stats[0] == 0, category


def forget(monkeypatch: pytest.MonkeyPatch, *, compiled: bool, faster: Any) -> None:
    """Make detectron2 have its extension or not, and faster-coco-eval be a module or absent."""
    official = average_precision.COCOeval
    other = type("COCOeval_opt", (official,), {})
    monkeypatch.setattr(average_precision, "COCOeval_opt", other if compiled else official)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", faster)


def fake(version: str) -> SimpleNamespace:
    return SimpleNamespace(__version__=version, COCO=object, COCOeval_faster=object)


@pytest.mark.parametrize(
    ("compiled", "faster", "official", "name"),
    [
        (True, fake("1.8.0"), False, r"detectron2 \S+ COCOeval_opt"),
        (True, fake("1.8.0"), True, r"pycocotools [\d.]+"),
        (False, fake("1.8.0"), False, r"faster-coco-eval 1\.8\.0"),
        (False, fake("2.0"), False, r"faster-coco-eval 2\.0"),
        (False, fake("1.8.0"), True, r"pycocotools [\d.]+"),
        (False, fake("1.7.2"), False, r"pycocotools \S+ \(faster-coco-eval 1\.7\.2 is older.*\)"),
        (False, None, False, r"pycocotools [\d.]+"),
        (False, None, True, r"pycocotools [\d.]+"),
    ],
)
def test_the_fastest_that_is_installed_is_taken_and_named(
    ground_truth: dict[str, Any],
    compiled: bool,
    faster: Any,
    official: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(monkeypatch, compiled=compiled, faster=faster)
    backend = find_backend(ground_truth, official)
    assert re.fullmatch(name, backend.name)


OBJECT = {
    **{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0},
    "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "a1"}, "annotation id 'a1' is not an integer of 0 or more"),
        ({"id": -1}, "annotation id -1 is not"),
        ({"id": 2.0}, "annotation id 2.0 is not"),
        ({"category_id": "1"}, "category id '1' is not an integer"),
        ({"image_id": ""}, "image id '' is not an integer"),
        ({"area": None}, "annotation 1 has area None"),
        ({"iscrowd": "0"}, "annotation 1 has iscrowd '0'"),
        ({"segmentation": [[1, 1, 5, 5]]}, "annotation 1 has a polygon of fewer than 3 points"),
        ({"segmentation": []}, "annotation 1 has a polygon of fewer than 3 points"),
    ],
)
def test_what_faster_coco_eval_reads_otherwise_is_left_to_pycocotools(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch, compiled=False, faster=fake("1.8.0"))
    content = {"images": [{"id": 1}], "categories": [], "annotations": [OBJECT]}
    assert find_backend(content).name == "faster-coco-eval 1.8.0"
    backend = find_backend({**content, "annotations": [{**OBJECT, **change}]})
    assert backend.coco_eval is average_precision.COCOeval
    assert backend.name.startswith("pycocotools ")
    assert f"(not faster-coco-eval 1.8.0: {reason}" in backend.name
    for image_id in ("1", -1, 2**63):
        assert (
            f"image id {image_id!r} is"
            in find_backend({**content, "images": [{"id": image_id}]}).name
        )


def test_an_image_id_that_the_dataset_lacks_is_named(
    ground_truth: dict[str, Any], predictions: list[list[dict[str, Any]]]
) -> None:
    stray = [{**predictions[1][0], "image_id": 999}]
    with pytest.raises(ValueError, match="image 999, but it is not among the 40 images"):
        Detections([pack(stray)], ["bbox"], ground_truth)


def test_packed_predictions_are_small_and_come_back_whole(
    predictions: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    packed = [pack(image) for image in predictions]
    assert [unpack(image) for image in packed] == predictions
    everything = [p for image in predictions for p in image]
    assert sum(map(len, packed)) < 0.5 * len(json.dumps(everything))
    write_predictions(tmp_path / "new" / "file.json", packed)
    assert (tmp_path / "new" / "file.json").read_text() == json.dumps(everything)
    write_predictions(tmp_path / "none.json", [pack([]), pack([])])
    assert (tmp_path / "none.json").read_text() == "[]"


def test_groups_hold_neighbouring_categories(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        {"image_id": 1, "category_id": c, "bbox": [0, 0, 1, 1], "score": 0.5}
        for c in [1] * 9 + [2] * 1 + [4] * 2 + [5] * 9
    ]
    content: dict[str, Any] = {"images": [{"id": 1}], "annotations": []}
    detections = Detections([pack(results)], ["bbox"], content)
    assert len(detections) == 21
    # Each category also counts its pairs with the one image.
    monkeypatch.setattr(average_precision, "GROUP_SIZE", 6)
    assert list(detections.groups([1, 2, 3, 4, 5, 6])) == [[1], [2, 3, 4], [5], [6]]
    monkeypatch.setattr(average_precision, "GROUP_SIZE", 5)
    assert list(detections.groups([1, 2, 3, 4, 5, 6])) == [[1], [2, 3], [4], [5], [6]]
