"""AP is COCO's to the last digits, whatever computes it, and however the predictions are kept."""

import copy
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from benchmark.made_up_detections import made_up_ground_truth, made_up_predictions
from mask_rcnn_plugin.evaluation import average_precision
from mask_rcnn_plugin.evaluation.average_precision import (
    Backend,
    count_keypoints,
    evaluate_tasks,
    find_backend,
)
from mask_rcnn_plugin.evaluation.predictions import coco_results, pack

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


def backends() -> list[Backend]:
    """pycocotools and whatever is faster and installed."""
    found = {backend.name: backend for backend in (find_backend(True), find_backend())}
    try:
        import faster_coco_eval as faster
    except ImportError:
        return list(found.values())
    name = f"faster-coco-eval {faster.__version__}"
    return list({**found, name: Backend(name, faster.COCO, faster.COCOeval_faster)}.values())


BACKENDS = backends()
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name.split()[0])


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
    before = copy.deepcopy(ground_truth)
    packed = [pack(image) for image in predictions]
    summary = evaluate_tasks(backend, ground_truth, packed, [task], max_dets, SIGMAS, image_ids)
    assert ground_truth == before
    return summary[task]


@every_backend
@pytest.mark.parametrize("task", TASKS)
def test_every_backend_gives_the_numbers_of_pycocotools(
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(average_precision, "_GROUP_SIZE", 300)  # several groups
    ours = scored(backend, ground_truth, predictions, task, [1, 10, 100])
    theirs = plain(ground_truth, predictions, task, [1, 10, 100])
    assert 0.05 < theirs.stats[0] < 0.95
    assert len(ours.stats) == len(theirs.stats) == (10 if task == "keypoints" else 12)
    for key in ("precision", "recall"):
        np.testing.assert_allclose(ours.eval[key], theirs.eval[key], rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.stats, theirs.stats, rtol=0, atol=1e-10)


@every_backend
@pytest.mark.parametrize("task", TASKS)
def test_ids_of_any_kind_give_the_same_numbers(
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    backend: Backend,
) -> None:
    """Annotations 0 and below 0, which COCO's code takes for unmatched; images below 0 or texts."""
    expected = scored(backend, ground_truth, predictions, task, [1, 10, 100])

    def renamed(items: list[dict[str, Any]], image: Any) -> list[dict[str, Any]]:
        return [
            {
                **item,
                "image_id": image(item["image_id"]),
                "category_id": item["category_id"] - 9,
                **({"id": 150 - item["id"]} if "id" in item else {}),
            }
            for item in items
        ]

    for image in (lambda n: n - 20, lambda n: f"{n:03}", lambda n: n + 2**63):
        content = {
            "images": [{**i, "id": image(i["id"])} for i in ground_truth["images"]],
            "categories": [{**c, "id": c["id"] - 9} for c in ground_truth["categories"]],
            "annotations": renamed(ground_truth["annotations"], image),
        }
        assert {0, -1} < {annotation["id"] for annotation in content["annotations"]}
        found = [renamed(items, image) for items in predictions]
        ours = scored(backend, content, found, task, [1, 10, 100])
        np.testing.assert_array_equal(ours.stats, expected.stats)


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
    for backend in BACKENDS:
        ours = scored(backend, ground_truth, predictions, task, list(max_dets), some)
        for key in ("precision", "recall"):
            np.testing.assert_allclose(ours.eval[key], theirs.eval[key], rtol=0, atol=1e-10)
        highest = theirs.eval["precision"][:, :, :, 0, -1]
        assert ours.stats[0] == pytest.approx(highest[highest > -1].mean(), abs=1e-10)


@every_backend
@pytest.mark.parametrize("task", TASKS)
def test_nothing_to_find_is_minus_one_and_nothing_found_is_zero(
    ground_truth: dict[str, Any],
    predictions: list[list[dict[str, Any]]],
    task: str,
    backend: Backend,
) -> None:
    empty = {**ground_truth, "annotations": []}
    wrong = [[{**p, "category_id": 5} for p in image] for image in predictions]
    assert set(scored(backend, empty, predictions, task, [1, 10, 100]).stats) == {-1}
    stats = scored(backend, ground_truth, wrong, task, [1, 10, 100]).stats
    np.testing.assert_array_equal(stats, plain(ground_truth, wrong, task, [1, 10, 100]).stats)
    assert stats[0] == 0
    none = scored(backend, ground_truth, [[], []], task, [1, 10, 100])
    np.testing.assert_array_equal(none.stats, stats)
    assert (none.eval["precision"][:, :, 2] == -1).all()  # category 5, of which there is no object


# Two thirds are found, with the highest scores: of the 101 recalls at which COCO reads the
# precision, it is 1 at the first 67 and 0 at the others.
@every_backend
@pytest.mark.parametrize(
    ("task", "objects"),
    [("bbox", 256), ("segm", 1), ("segm", 255), ("segm", 256), ("segm", 300), ("segm", 1000)],
)
def test_any_number_of_objects_in_an_image_counts(
    objects: int, task: str, backend: Backend
) -> None:
    missed = objects // 3
    corners = [(40 * (i % 25), 40 * (i // 25)) for i in range(objects)]
    squares = [[x, y, 20, 20] for x, y in corners]
    image = {"id": 1, "height": 1600, "width": 1000}
    rles = coco_mask.frPyObjects(np.array(squares, dtype=float), 1600, 1000)
    masks = [{"size": [1600, 1000], "counts": rle["counts"].decode()} for rle in rles]
    common = {"image_id": 1, "category_id": 1}
    content = {
        "images": [image],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {**common, "id": i, "iscrowd": 0, "area": 400, "bbox": box, "segmentation": mask}
            for i, (box, mask) in enumerate(zip(squares, masks))
        ],
    }
    found = [
        {**common, "score": 1 - i / objects, "bbox": box, "segmentation": mask}
        for i, (box, mask) in enumerate(zip(squares, masks))
    ]
    for i in range(objects - missed, objects):
        found[i]["bbox"], found[i]["segmentation"] = squares[0], masks[0]  # found a second time
    stats = scored(backend, content, [found], task, [1, 10, 1000]).stats
    assert stats[0] == pytest.approx(1 if objects == 1 else 67 / 101, abs=1e-12)
    assert stats[8] == pytest.approx((objects - missed) / objects, abs=1e-12)  # AR


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
    compiled: bool,
    faster: Any,
    official: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(monkeypatch, compiled=compiled, faster=faster)
    backend = find_backend(official)
    assert re.fullmatch(name, backend.name)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({}, 1), ({"num_keypoints": None}, 1), ({"num_keypoints": "x"}, 1), ({"num_keypoints": 0}, 0)],
)
def test_labelled_keypoints_are_those_stated_or_counted(
    stated: dict[str, Any], expected: int
) -> None:
    assert count_keypoints({"keypoints": [3, 4, 2, 0, 0, 0], **stated}) == expected
