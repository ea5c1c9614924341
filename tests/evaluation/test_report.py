"""The report's numbers are those of the evaluation, and it shows the worst first."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator
from mask_rcnn_plugin.evaluation.error_analysis import find_mistakes
from mask_rcnn_plugin.evaluation.pictures import draw_truth
from mask_rcnn_plugin.evaluation.report import write_report
from mask_rcnn_plugin.modeling import RLEMasks

NAMES = ["cat", "<b>dog</b> & $co", "Vögel", "never there"]
SIZE = 200  # pixels
GREY = 90


def rectangle(box: list[float]) -> dict[str, Any]:
    x, y, w, h = (int(side) for side in box)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """30 images of up to 6 objects, small to large, on a grid; category ids 3, 5, 7, 9."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, 31):
        for cell in rng.permutation(9)[: rng.integers(0, 7)].tolist():
            width, height = rng.integers(12, 56, 2).tolist()
            box = [60 * (cell % 3) + 8, 60 * (cell // 3) + 8, width, height]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 2 * int(rng.integers(3)) + 3,
                    "bbox": box,
                    "segmentation": [corners(box)],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i:03}.png", "height": SIZE, "width": SIZE}
            for i in range(1, 31)
        ],
        "categories": [{"id": 2 * i + 3, "name": name} for i, name in enumerate(NAMES)],
        "annotations": annotations,
    }


def register(content: dict[str, Any], folder: Path) -> str:
    """A dataset of a COCO file's content, with grey pictures."""
    (folder / "images").mkdir()
    for image in content["images"]:
        grey = np.full((SIZE, SIZE, 3), GREY, np.uint8)
        cv2.imwrite(str(folder / "images" / image["file_name"]), grey)
    (folder / "data.json").write_text(json.dumps(content))
    return register_coco_dataset(str(folder / "data.json"), str(folder / "images"))


Found = list[tuple[int, list[float], float]]  # category id, box, score


def noisy(content: dict[str, Any]) -> dict[int, Found]:
    """Of each image: most objects a little off, some taken for others, and some false ones."""
    rng = np.random.default_rng(1)
    found: dict[int, Found] = {image["id"]: [] for image in content["images"]}
    for truth in content["annotations"]:
        x, y, w, h = truth["bbox"]
        chance = rng.random()
        box = [x + int(rng.integers(-1, 2)), y + int(rng.integers(-1, 2)), w, h]
        category = truth["category_id"] if chance < 0.8 else int(rng.choice([3, 5, 7, 9]))
        if chance < 0.9:
            found[truth["image_id"]].append((category, box, rng.uniform(0.2, 0.9)))
    for image in found.values():
        for _ in range(rng.integers(0, 4)):
            x, y = rng.integers(0, 150, 2).tolist()
            image.append((int(rng.choice([3, 5, 7, 9])), [x, y, 30, 30], rng.uniform(0, 0.6)))
    return found


def perfect(content: dict[str, Any], score: float = 0.8) -> dict[int, Found]:
    found: dict[int, Found] = {image["id"]: [] for image in content["images"]}
    for truth in content["annotations"]:
        found[truth["image_id"]].append((truth["category_id"], truth["bbox"], score))
    return found


def evaluated(
    dataset: str, found: dict[int, Found], tasks: tuple[str, ...] = ("bbox", "segm"), **kwargs: Any
) -> tuple[MaskRCNNCOCOEvaluator, dict[str, dict[str, float]]]:
    evaluator = MaskRCNNCOCOEvaluator(dataset, tasks, **kwargs)
    evaluator.reset()
    for image_id, items in found.items():
        boxes = torch.tensor([box for _, box, _ in items], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(boxes),
            pred_classes=torch.tensor([(c - 3) // 2 for c, _, _ in items], dtype=torch.int64),
            scores=torch.tensor([s for _, _, s in items], dtype=torch.float64),
            pred_masks=RLEMasks([rectangle(box) for _, box, _ in items], (SIZE, SIZE)),
        )
        if "keypoints" in tasks:
            xy = boxes[:, None, :2] + torch.tensor([[0.0, 0], [10, 10]])
            instances.pred_keypoints = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=2)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator, evaluator.evaluate()


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def matrix(folder: Path) -> np.ndarray:
    with (folder / "confusion_matrix.csv").open(newline="") as lines:
        return np.array([row[1:] for row in list(csv.reader(lines))[1:]], dtype=int)


class Page(HTMLParser):
    """The text of a page and the files that it names."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.files = "", []
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.files.append(value)


Scored = tuple[MaskRCNNCOCOEvaluator, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def scored(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """The evaluator of noisy predictions, and its results."""
    return evaluated(register(content, tmp_path_factory.mktemp("data")), noisy(content))


@pytest.fixture(scope="module")
def report(scored: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report on it."""
    return write_report(scored[0], tmp_path_factory.mktemp("out") / "report").parent


@pytest.fixture(scope="module")
def report_at_40(scored: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of predictions above a score of 0.4."""
    return write_report(scored[0], tmp_path_factory.mktemp("out") / "report", 0.4).parent


@pytest.mark.parametrize("official", [False, True])
def test_the_area_under_each_curve_is_the_ap(
    content: dict[str, Any], tmp_path: Path, official: bool
) -> None:
    """Of the mean over the IoUs the AP, at an IoU of 0.5 AP50."""
    evaluator, results = evaluated(register(content, tmp_path), noisy(content), official=official)
    points = table(write_report(evaluator, tmp_path / "report").with_name("curves.csv"))
    for task in ("bbox", "segm"):
        at_50 = []
        for name in NAMES[:3]:
            of_class = [p for p in points if (p["task"], p["class"]) == (task, name)]
            recall, precision, precision_50 = (
                np.array([float(p[c]) for p in of_class])
                for c in ("recall", "precision", "precision_50")
            )
            assert np.allclose(recall, np.linspace(0, 1, 101))
            assert 100 * precision.mean() == pytest.approx(results[task][f"AP-{name}"], abs=1e-9)
            assert 10 < results[task][f"AP-{name}"] < 90
            at_50.append(100 * precision_50.mean())
        assert np.mean(at_50) == pytest.approx(results[task]["AP50"], abs=1e-9)
    assert not [p for p in points if p["class"] == NAMES[3]]  # which has no instances


def test_the_class_table_has_the_results(
    scored: Scored, report: Path, content: dict[str, Any]
) -> None:
    rows = {(row["task"], row["class"]): row for row in table(report / "classes.csv")}
    for task in ("bbox", "segm"):
        results, everything = scored[1][task], rows[task, "(all classes)"]
        for metric in ("AP", "AP50", "AP75", "APs", "APm"):
            assert float(everything[metric]) == pytest.approx(results[metric], abs=1e-9)
        assert everything["APl"] == everything["ARl"] == ""  # no object is that large
        assert int(everything["instances"]) == len(content["annotations"])
        for name in NAMES[:3]:
            assert float(rows[task, name]["AP"]) == pytest.approx(results[f"AP-{name}"])
        absent = rows[task, NAMES[3]]
        assert (absent["instances"], absent["AP"], absent["threshold"]) == ("0", "", "")


def test_recall_is_by_size(content: dict[str, Any], tmp_path: Path) -> None:
    """All small objects are found and no other."""
    found = perfect({**content, "annotations": [a for a in content["annotations"] if small(a)]})
    evaluator, _ = evaluated(register(content, tmp_path), found)
    row = table(write_report(evaluator, tmp_path / "report").with_name("classes.csv"))[0]
    assert (float(row["ARs"]), float(row["ARm"])) == (100, 0)
    of_class = [[a for a in content["annotations"] if a["category_id"] == c] for c in (3, 5, 7)]
    parts = [sum(map(small, objects)) / len(objects) for objects in of_class]
    assert float(row["AR"]) == pytest.approx(100 * np.mean(parts))


def small(annotation: dict[str, Any]) -> bool:
    return annotation["area"] < 32**2


def test_f1_is_best_at_the_threshold(
    scored: Scored, report: Path, content: dict[str, Any], tmp_path: Path
) -> None:
    """F1, precision and recall are those of instances that are counted, at every threshold."""
    evaluator = scored[0]
    rows = [r for r in table(report / "classes.csv") if r["task"] == "segm"][1:4]
    for k, row in enumerate(rows):
        category = 2 * k + 3
        scores = [s for image in noisy(content).values() for c, _, s in image if c == category]
        threshold = float(row["threshold"])
        assert threshold in scores
        measured = {}
        for score in scores:
            counts, _, _ = find_mistakes(
                evaluator.coco, evaluator.scored, {category: score}, "segm"
            )
            precision, recall = (counts[k, k] / counts.sum(axis)[k] for axis in (0, 1))
            measured[score] = 2 * precision * recall / (precision + recall), precision, recall
        f1, precision, recall = measured[threshold]
        assert f1 == max(f1 for f1, _, _ in measured.values())
        assert precision == pytest.approx(float(row["precision"]), abs=1e-9)
        assert 0 <= recall - float(row["recall"]) < 0.01
        assert 0 <= f1 - float(row["F1"]) < 0.01
        assert matrix(report)[k, k] / matrix(report)[k].sum() == recall  # this threshold is used


def test_the_margins_are_instances_and_predictions(
    report_at_40: Path, content: dict[str, Any]
) -> None:
    counts = matrix(report_at_40)
    truth = [a["category_id"] for a in content["annotations"]]
    predicted = [c for image in noisy(content).values() for c, _, s in image if s >= 0.4]
    for k, category in enumerate((3, 5, 7, 9)):
        assert counts[k].sum() == truth.count(category)
        assert counts[:, k].sum() == predicted.count(category)
    assert counts[-1, -1] == 0
    kinds = [m["kind"] for m in table(report_at_40 / "mistakes.csv")]
    assert kinds.count("missed") == counts[:-1, -1].sum() > 0
    assert kinds.count("false") == counts[-1, :-1].sum() > 0
    assert kinds.count("confused") == counts[:-1, :-1].sum() - counts[:-1, :-1].trace() > 0


def test_the_matrix_is_that_of_supervision(report_at_40: Path, content: dict[str, Any]) -> None:
    predictions, targets = [], []
    for image_id, found in noisy(content).items():
        objects = [a for a in content["annotations"] if a["image_id"] == image_id]
        truth = [[*a["bbox"], (a["category_id"] - 3) // 2] for a in objects]
        predicted = [[*box, (category - 3) // 2, score] for category, box, score in found]
        for arrays, items, width in ((targets, truth, 5), (predictions, predicted, 6)):
            array = np.array(items, dtype=float).reshape(-1, width)
            array[:, 2:4] += array[:, :2]
            arrays.append(array)
    theirs = sv.ConfusionMatrix.from_tensors(
        predictions, targets, NAMES, conf_threshold=0.4, iou_threshold=0.5
    )
    assert matrix(report_at_40).tolist() == theirs.matrix.tolist()


def test_a_planted_label_swap_tops_the_gallery(content: dict[str, Any], tmp_path: Path) -> None:
    found = perfect(content)
    # The model errs too: it is less sure of one class, and surer of an object that is not there.
    _, box, _ = found[20][0]
    found[20][0] = (9, box, 0.7)
    found[9].append((3, [140, 140, 50, 50], 0.99))
    content = json.loads(json.dumps(content))
    swapped = next(a for a in content["annotations"] if a["image_id"] == 12)
    right = swapped["category_id"]
    swapped["category_id"] = 3 if right == 5 else 5
    evaluator, _ = evaluated(register(content, tmp_path), found)
    index = write_report(evaluator, tmp_path / "report")
    predicted, truth = (NAMES[(c - 3) // 2] for c in (right, swapped["category_id"]))
    first, second, *_ = table(index.with_name("mistakes.csv"))
    assert (first["kind"], first["image_id"]) == ("confused", "12")
    assert (first["predicted"], first["truth"]) == (predicted, truth)
    assert json.loads(first["box"]) == swapped["bbox"]
    assert (second["kind"], second["image_id"]) == ("confused", "20")
    page = Page(index)
    pictures = [file for file in page.files if file.endswith("jpg")]
    assert [Path(file).stem[:-3] for file in pictures] == ["confused", "confused", "false"]
    caption = page.text[page.text.index("012.png") : page.text.index("020.png")]
    x, y, w, h = swapped["bbox"]
    for text in (f"{truth} taken for {predicted}", f"x {x} to {x + w}", f"y {y} to {y + h}"):
        assert text in caption


def test_ground_truth_is_left_predictions_are_right_and_the_place_is_marked(
    content: dict[str, Any], tmp_path: Path
) -> None:
    found = perfect(content)
    seen = {**content["annotations"][0], "image_id": 9, "bbox": [8, 8, 40, 40], "area": 1600}
    seen["segmentation"] = [corners(seen["bbox"])]
    found[9] = [(3, [100, 100, 60, 60], 0.99), (seen["category_id"], seen["bbox"], 0.8)]
    others = [a for a in content["annotations"][1:] if a["image_id"] != 9]
    found[content["annotations"][0]["image_id"]].pop(0)
    content = {**content, "annotations": [seen, *others]}
    evaluator, _ = evaluated(register(content, tmp_path), found)
    np.random.seed(0)  # detectron2's visualizer draws its colours
    write_report(evaluator, tmp_path / "report")
    (file,) = (tmp_path / "report" / "pictures").iterdir()
    picture = cv2.imread(str(file)).astype(int)
    height, width, _ = picture.shape
    assert width == 2 * height
    left, right = picture[:, :height], picture[:, height:]
    scale = height / SIZE
    assert np.abs(left[int(20 * scale), int(30 * scale)] - GREY).max() > 30
    inside = slice(int(125 * scale), int(150 * scale))
    assert np.abs(left[inside, inside] - GREY).max() < 10
    assert np.abs(right[inside, inside] - GREY).max() > 30
    for half in (left, right):
        blue, _, red = half[inside, int(100 * scale)].mean(axis=0)
        assert red > blue + 80


def test_a_small_object_is_seen_beside_its_number(content: dict[str, Any], tmp_path: Path) -> None:
    """Also one in the corner, and one at the lower border."""
    found = perfect(content)
    boxes = [[1, 1, 6, 6], [100, 100, 6, 6], [150, SIZE - 7, 6, 6]]
    found[9] = [(3, box, 0.99) for box in boxes]
    annotations = [a for a in content["annotations"] if a["image_id"] != 9]
    evaluator, _ = evaluated(
        register({**content, "annotations": annotations}, tmp_path), found, ("bbox",)
    )
    write_report(evaluator, tmp_path / "report")
    (file,) = (tmp_path / "report" / "pictures").iterdir()
    left = cv2.imread(str(file)).astype(int)[:, :-1]
    left = left[:, : left.shape[1] // 2]
    scale = len(left) / SIZE
    for x, y, *_ in boxes:
        inside = left[int((y + 3) * scale), int((x + 3) * scale)]
        assert np.abs(inside - GREY).max() < 10, (x, y)
    red = (left[:, :, 2] > 180) & (left[:, :, 0] < 60)
    assert red[int(109 * scale), int(103 * scale)]  # below the box


def test_a_caption_says_what_is_false_of_a_prediction(
    content: dict[str, Any], tmp_path: Path
) -> None:
    found = perfect(content)
    image, (category, box, _) = next((i, f[0]) for i, f in found.items() if f)
    x, y, w, h = box
    found[image].append((category, [x + 1, y, w, h], 0.8))
    found[image].append((category, [x, y, w / 3, h], 0.7))
    found[image].append((9, [x, y, w / 3, h], 0.6))
    evaluator, _ = evaluated(register(content, tmp_path), found, ("bbox",))
    text = Page(write_report(evaluator, tmp_path / "report", threshold=0.5)).text
    name = NAMES[(category - 3) // 2]
    assert f"false {name}, score 0.800, a second detection of the same object, IoU 0.9" in text
    assert f"false {name}, score 0.700, imprecise, IoU 0.3" in text
    assert f"score 0.600, overlaps {name}, IoU 0.3" in text


def test_an_object_goes_to_a_prediction_of_its_class_first(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """Even if another class's is more confident and fits better."""
    box = [20, 20, 40, 40]
    truth = {**content["annotations"][0], "image_id": 1, "category_id": 5, "bbox": box}
    truth |= {"segmentation": [corners(box)], "area": 1600}
    found = {1: [(3, box, 0.9), (5, [24, 24, 40, 40], 0.7)]}
    evaluator, _ = evaluated(register({**content, "annotations": [truth]}, tmp_path), found)
    write_report(evaluator, tmp_path / "report")
    counts = matrix(tmp_path / "report")
    assert counts[1, 1] == counts[-1, 0] == 1
    assert counts.sum() == 2
    (mistake,) = table(tmp_path / "report" / "mistakes.csv")
    assert (mistake["kind"], mistake["predicted"], mistake["truth"]) == (
        "false",
        NAMES[0],
        NAMES[1],
    )


@pytest.mark.parametrize("tasks", [("bbox",), ("bbox", "segm")])
def test_masks_are_matched_where_they_are_scored(
    content: dict[str, Any], tmp_path: Path, tasks: tuple[str, ...]
) -> None:
    """An object that fills less than half of its box, which the prediction fills."""
    box = [20, 20, 40, 40]
    truth = {**content["annotations"][0], "image_id": 1, "category_id": 3, "bbox": box}
    truth |= {"segmentation": [[20, 20, 60, 20, 20, 55, 20, 60, 25, 25]], "area": 300}
    dataset = register({**content, "annotations": [truth]}, tmp_path)
    evaluator, _ = evaluated(dataset, {1: [(3, box, 0.9)]}, tasks)
    write_report(evaluator, tmp_path / "report")
    assert matrix(tmp_path / "report")[0, 0] == (tasks == ("bbox",))


def test_crowds_are_no_instances_and_what_lies_on_them_counts_nowhere(
    content: dict[str, Any], tmp_path: Path
) -> None:
    crowd, single = [0, 0, 100, 100], [120, 120, 50, 50]
    shared = {"image_id": 1, "category_id": 3}
    annotations = [
        {"id": 1, "bbox": crowd, "segmentation": rectangle(crowd), "area": 10_000, "iscrowd": 1},
        {"id": 2, "bbox": single, "segmentation": [corners(single)], "area": 2500, "iscrowd": 0},
    ]
    content = {**content, "annotations": [shared | a for a in annotations]}
    of_another_class = (5, [10, 50, 30, 30], 0.9)
    found = {1: [(3, [10, 10, 30, 30], 0.9), of_another_class, (3, single, 0.9)]}
    evaluator, _ = evaluated(register(content, tmp_path), found)
    page = Page(write_report(evaluator, tmp_path / "report"))
    counts = matrix(tmp_path / "report")
    assert counts[0, 0] == counts[-1, 1] == 1
    assert counts.sum() == 2
    assert "predictions on them (here: 1)" in page.text


@pytest.mark.parametrize("threshold", [None, 0.95])
def test_nothing_reaches_the_threshold(
    content: dict[str, Any], tmp_path: Path, threshold: float | None
) -> None:
    found = noisy(content) if threshold else {image["id"]: [] for image in content["images"]}
    evaluator, _ = evaluated(register(content, tmp_path), found)
    page = Page(write_report(evaluator, tmp_path / "report", threshold))
    counts = matrix(tmp_path / "report")
    assert counts[:, -1].sum() == counts.sum() == len(content["annotations"])
    best = max((s for image in found.values() for _, _, s in image), default=None)
    assert ("Nothing was predicted" if best is None else f"best score is {best:.3f}") in page.text
    assert len(table(tmp_path / "report" / "mistakes.csv")) == len(content["annotations"])


def test_a_test_set_without_objects(content: dict[str, Any], tmp_path: Path) -> None:
    dataset = register({**content, "annotations": []}, tmp_path)
    evaluator, _ = evaluated(dataset, perfect(content))
    write_report(evaluator, tmp_path / "report")
    assert matrix(tmp_path / "report")[-1].sum() == len(content["annotations"])
    assert not table(tmp_path / "report" / "curves.csv")


def test_keypoints_alone(content: dict[str, Any], tmp_path: Path) -> None:
    """Objects without keypoints count nowhere, as in AP; the others are matched by their boxes."""
    content = json.loads(json.dumps(content))
    content["categories"][0] |= {"keypoints": ["a", "b"], "keypoint_sigmas": [0.1, 0.1]}
    cats = [a for a in content["annotations"] if a["category_id"] == 3]
    for a in cats[2:]:
        x, y, _, _ = a["bbox"]
        a |= {"keypoints": [x, y, 2, x + 10, y + 10, 2], "num_keypoints": 2}
    cats[0]["keypoints"] = [0] * 6  # and the next has none
    dataset = register(content, tmp_path)
    evaluator, results = evaluated(dataset, noisy(content), ("keypoints",))
    page = Page(write_report(evaluator, tmp_path / "report"))
    rows = {row["class"]: row for row in table(tmp_path / "report" / "classes.csv")}
    assert float(rows["cat"]["AP"]) == pytest.approx(results["keypoints"]["AP-cat"])
    assert float(rows["cat"]["AP"]) > 10
    assert "APs" not in rows["cat"]
    assert int(rows["cat"]["instances"]) == len(cats) - 2
    assert rows["Vögel"]["instances"] == "0"
    assert int(rows["(all classes)"]["instances"]) == len(cats) - 2
    assert rows["Vögel"]["AP"] == ""
    counts = matrix(tmp_path / "report")
    assert counts[0].sum() == counts[:-1].sum() == len(cats) - 2
    assert "by the IoU of their boxes" in page.text


def test_the_page_stands_alone_and_escapes_names(report: Path) -> None:
    source, page = (report / "index.html").read_text("utf-8"), Page(report / "index.html")
    assert "<b>" not in source.replace("<body>", "")
    assert NAMES[1] in page.text
    assert {"curves.csv", "classes.csv", "confusion_matrix.csv", "mistakes.csv"} < set(page.files)
    for file in page.files:
        assert (report / file).is_file(), file
    assert "100 detections per image (dataset.test.max_detections)" in page.text
    assert "http" not in source
    assert "None" not in page.text
    assert "nan" not in page.text


def test_1203_classes_leave_the_page_readable(content: dict[str, Any], tmp_path: Path) -> None:
    annotations = [
        {**a, "category_id": 2 * (7 * a["id"] % 1203) + 3} for a in content["annotations"]
    ]
    categories = [{"id": 2 * i + 3, "name": f"class {i}"} for i in range(1203)]
    content = {**content, "categories": categories, "annotations": annotations}
    evaluator, _ = evaluated(register(content, tmp_path), perfect(content))
    index = write_report(evaluator, tmp_path / "report")
    assert index.stat().st_size < 200_000
    assert matrix(tmp_path / "report").shape == (1204, 1204)
    assert len(table(tmp_path / "report" / "classes.csv")) == 2 * 1204
    for text in ("100 of 1203", "25 of 1203", "10 of 1203"):
        assert text in Page(index).text


def test_images_that_are_gone_are_named_without_a_picture(
    content: dict[str, Any], tmp_path: Path
) -> None:
    evaluator, _ = evaluated(register(content, tmp_path), noisy(content))
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    index = write_report(evaluator, tmp_path / "report")
    worst = table(index.with_name("mistakes.csv"))[0]
    assert not list((tmp_path / "report" / "pictures").iterdir())
    assert f"{int(worst['image_id']):03}.png" in Page(index).text


def test_a_picture_that_cannot_be_drawn_is_left_out(
    scored: Scored,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def draw(image: dict[str, Any], metadata: Any) -> np.ndarray:
        if image["image_id"] == worst:
            raise KeyError("of the visualizer")
        return draw_truth(image, metadata)

    first = write_report(scored[0], tmp_path / "report")
    worst = int(table(first.with_name("mistakes.csv"))[0]["image_id"])
    before = Page(first).files
    monkeypatch.setattr("mask_rcnn_plugin.evaluation.report.draw_truth", draw)
    page = Page(write_report(scored[0], tmp_path / "report"))
    assert f"{worst:03}.png" in page.text
    assert 0 < len({*page.files}) < len({*before})
    assert f"image {worst} " in caplog.text
    assert "of the visualizer" in caplog.text


def test_a_report_replaces_the_one_before(
    scored: Scored, content: dict[str, Any], tmp_path: Path
) -> None:
    write_report(scored[0], tmp_path / "report")
    assert len(list((tmp_path / "report" / "pictures").iterdir())) > 10
    evaluator, _ = evaluated(register(content, tmp_path), perfect(content))
    write_report(evaluator, tmp_path / "report")
    assert not list((tmp_path / "report" / "pictures").iterdir())
