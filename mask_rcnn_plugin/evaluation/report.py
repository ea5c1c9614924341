"""The report of an evaluation: a page with pictures beside it, and its tables as CSV."""

import csv
import logging
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure

from mask_rcnn_plugin.evaluation.error_analysis import (
    KINDS,
    MATCHING_IOU,
    Mistake,
    Row,
    class_names,
    class_table,
    curve,
    find_mistakes,
    reaching,
)
from mask_rcnn_plugin.evaluation.evaluator import MaskRCNNCOCOEvaluator
from mask_rcnn_plugin.evaluation.pictures import draw_prediction, draw_truth
from mask_rcnn_plugin.evaluation.predictions import unpack

logger = logging.getLogger(__name__)

# For a class whose scores give none: it has no instances, or none of them is found.
_FALLBACK_THRESHOLD = 0.5

# What the page shows at most; the CSV files have all.
_ROWS = 100  # classes of the table, those with least AP
_CURVES = 10  # likewise
_CELLS = 25  # classes of the matrix, those with most mistakes
_CONFUSIONS = 20  # pairs of classes
_PICTURES = 10  # of each kind of mistake
_MARKED = 10  # mistakes in a picture

_RED, _WHITE = (220, 0, 0), (255, 255, 255)


def write_report(
    evaluator: MaskRCNNCOCOEvaluator, folder: Path, threshold: float | None = None
) -> Path:
    """Write what a model gets wrong; docs/report.md says how to read it.

    Args:
        evaluator: has scored predictions, not box proposals.
        folder: made if missing. A report in it is replaced.
        threshold: the least score of predictions that are compared with the ground truth one by
            one; by default that of each class's best F1, and 0.5 for a class that has none.

    Returns:
        FOLDER/index.html.
    """
    logger.info("Writing the report to %s ...", folder)
    coco, names = evaluator.coco, class_names(evaluator.coco)
    tables = {task: class_table(task, s, coco) for task, s in evaluator.evaluated.items()}
    main = next(task for task in ("segm", "bbox", "keypoints") if task in tables)
    thresholds = {}
    for id_, row in zip(sorted(coco.cats), tables[main][1:]):
        best = _FALLBACK_THRESHOLD if math.isnan(row["threshold"]) else row["threshold"]
        thresholds[id_] = best if threshold is None else threshold
    matrix, mistakes, on_crowds = find_mistakes(coco, evaluator.scored, thresholds, main)
    reached = int(matrix[:, :-1].sum()) + on_crowds
    scores = (p["score"] for packed in evaluator.scored.values() for p in unpack(packed))

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "pictures").glob("*.jpg"):
        old.unlink()
    rows = [*chain(*tables.values())]
    columns = [*dict.fromkeys(chain(*rows))]
    _write_csv(folder / "classes.csv", columns, ([r.get(c, "") for c in columns] for r in rows))
    _write_csv(folder / "mistakes.csv", Mistake._fields, mistakes)
    counts = [[name, *row] for name, row in zip([*names, "no object"], matrix.tolist())]
    _write_csv(folder / "confusion_matrix.csv", ["ground truth", *names, "missed"], counts)
    points = []
    for task, scored in evaluator.evaluated.items():
        curves = [curve(scored, k) for k in range(len(names))]
        for name, of_class in zip(names, curves):
            points += [[task, name, *point] for point in zip(*of_class.values())]
        overall, *table = tables[task]
        worst_first = np.argsort([row["AP"] for row in table], kind="stable")  # NaN comes last
        drawn = [(table[k], curves[k]) for k in worst_first[:_CURVES] if curves[k]["recall"].size]
        _plot_curves(folder / f"curves_{task}.png", drawn)
        tables[task] = [overall, *(table[k] for k in worst_first[:_ROWS])]
    _write_csv(folder / "curves.csv", ["task", "class", *curves[0]], points)

    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    cells = [*np.sort(np.argsort(-wrong[:-1], kind="stable")[:_CELLS]), len(names)]
    confused = Counter((m.truth, m.predicted) for m in mistakes if m.kind == "confused")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, trim_blocks=True).render(
        dataset=evaluator.dataset_name,
        backend=evaluator.backend,
        max_detections=evaluator.given_max_detections,
        num_images=len(coco.imgs),
        num_classes=len(names),
        num_curves=_CURVES,
        matching_iou=MATCHING_IOU,
        main=main,
        threshold=threshold,
        reached=reached,
        best_score=None if reached else max(scores, default=None),
        on_crowds=on_crowds,
        kinds=Counter(m.kind for m in mistakes),
        metrics=[c for c in rows[0] if c.startswith(("AP", "AR"))],
        tables=tables,
        cells=[(counts[g][0], [matrix[g, d] for d in cells], matrix[g].sum()) for g in cells],
        confusions=confused.most_common(_CONFUSIONS),
        gallery=_draw_gallery(folder, evaluator, mistakes, thresholds),
    )
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(["" if x != x else x for x in row] for row in rows)  # NaN


def _plot_curves(path: Path, classes: list[tuple[Row, dict[str, np.ndarray]]]) -> None:
    """Precision by recall, and F1 by threshold, from rows of `class_table` and their `curve`."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = (
        "precision, mean of the IoUs (area: AP)",
        "precision, IoU 0.5 (area: AP50)",
        "F1, IoU 0.5",
    )
    for axis, title, x in zip(axes, titles, ("recall", "recall", "least score")):
        axis.set(title=title, xlabel=x, xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    for row, points in classes:
        label = f"{row['AP']:.1f} {row['class'][:30]}".replace("$", r"\$")
        reached = points["F1_50"] > 0
        axes[0].plot(points["recall"], points["precision"], label=label)
        axes[1].plot(points["recall"], points["precision_50"])
        (line,) = axes[2].plot(points["score_50"][reached], points["F1_50"][reached])
        axes[2].plot(row["threshold"], row["F1"], "o", color=line.get_color())
    if classes:
        figure.legend(loc="outside lower center", ncols=5, title="AP and class")
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks; the page has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=110)


def _draw_gallery(
    folder: Path,
    evaluator: MaskRCNNCOCOEvaluator,
    mistakes: list[Mistake],
    thresholds: Mapping[Any, float],
) -> dict[str, list[dict[str, Any]]]:
    """Of each kind the images with the worst mistakes: picture, file name and mistakes."""
    metadata = MetadataCatalog.get(evaluator.dataset_name)
    images = {image["image_id"]: image for image in DatasetCatalog.get(evaluator.dataset_name)}
    gallery: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for kind, entries in gallery.items():
        worst = defaultdict(list)
        for mistake in mistakes:
            if mistake.kind == kind:
                worst[mistake.image_id].append(mistake)
        for image_id, found in islice(worst.items(), _PICTURES):
            entry = {"file": images[image_id]["file_name"], "id": image_id, "number": len(found)}
            entry["mistakes"] = found[:_MARKED]
            entry["picture"] = f"pictures/{kind}_{len(entries):02}.jpg"
            shown = reaching(evaluator.scored.get(image_id), thresholds)
            try:
                truth = draw_truth(images[image_id], metadata)
                picture = np.hstack([truth, draw_prediction(images[image_id], shown, metadata)])
                _mark(picture, found[:_MARKED], evaluator.coco.imgs[image_id]["width"])
                cv2.imwrite(str(folder / entry["picture"]), picture[:, :, ::-1])
            except Exception as error:  # the report is worth more than one of its pictures
                logger.warning("No picture of image %r in the report: %r", image_id, error)
                entry["picture"] = ""
            entries.append(entry)
    return gallery


def _mark(picture: np.ndarray, mistakes: list[Mistake], image_width: int) -> None:
    """Draw a numbered box for each mistake, in both halves; RGB."""
    height, width = picture.shape[0], picture.shape[1] // 2
    scale = width / image_width
    for number, mistake in enumerate(mistakes, 1):
        x, y, w, h = (round(scale * side) for side in mistake.box)
        for left in (x, x + width):
            cv2.rectangle(picture, (left, y), (left + w, y + h), _RED, 3)
            # Outside the box, which may be small; detectron2's labels are at the other corners.
            end = max(left + w, left - x + 18 * len(str(number)) + 4)
            below = y + h + 22 <= height
            tag = end - 18 * len(str(number)) - 4, y + h if below else max(y - 22, 0)
            cv2.rectangle(picture, tag, (end, tag[1] + 22), _RED, cv2.FILLED)
            place = tag[0] + 3, tag[1] + 18
            cv2.putText(picture, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, 0.7, _WHITE, 2)
