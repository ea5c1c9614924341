"""What docs/real_images.md says, of real_images/results.json, which tools/real_images.py writes."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO

from reproduce import report
from reproduce.claims import CLAIMS

_ROW = "table2a_backbone/r50_fpn"
_RANDOM = ["train.init_checkpoint=", "model.backbone.norm=BN"]
# Name: row and what is changed of it. The first is looked at more closely.
MODELS: dict[str, tuple[str, list[str]]] = {
    "EfficientNet-Lite0, ImageNet": (_ROW, []),
    "EfficientNet-Lite0, random": (_ROW, _RANDOM),
    "ResNet-18, random": (_ROW, [*_RANDOM, "model.backbone.name=resnet18"]),
    "EfficientNet-Lite0, ImageNet, RoIPool": ("fpn_roi_layer/roipool", []),
    "EfficientNet-Lite0, ImageNet, MLP": ("table2e_mask_branch/mlp_2fc", []),
}
_SCORES = ["mask AP", "mask AP50", "mask AP75", "box AP", "ms an image"]
_EDGES = (0, 12, 24, 48, 1000)  # of a box's side, the square root of its area, in pixels
_FALSE = ("on none", "a second", "imprecise")  # predictions


def _sides(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    return np.sqrt([w * h for _, _, w, h in boxes])


def describe(coco: COCO) -> list[float]:
    """Images, nuclei, most nuclei in an image, and quantiles of their sides in pixels."""
    boxes = [a["bbox"] for a in coco.anns.values()]
    sides = np.quantile(_sides(boxes), (0.01, 0.1, 0.5, 0.9, 0.99)).round(1).tolist()
    return [len(coco.imgs), len(boxes), max(map(len, coco.imgToAnns.values())), *sides]


def curve(metrics: Path, max_iter: int) -> list[list[float]]:
    """[iterations done, mask AP] of each evaluation of a training, of its metrics.json."""
    lines = [line for line in map(json.loads, metrics.open()) if "segm/AP" in line]
    # The evaluation after the training is logged at one iteration more, one repeated by a resume
    # a second time.
    points = {min(line["iteration"] + 1, max_iter): line["segm/AP"] for line in lines}
    return [[iteration, ap] for iteration, ap in points.items()]


def errors(coco: COCO, mistakes: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """How many nuclei and mistakes there are of each size, of the lines of mistakes.csv."""
    boxes: dict[str, list[Any]] = {"nuclei": [a["bbox"] for a in coco.anns.values()]}
    boxes |= {kind: [] for kind in ("missed", *_FALSE)}
    for mistake in mistakes:
        kind = mistake["kind"]
        if kind == "false":
            fits = mistake["truth"] and float(mistake["iou"]) >= 0.5
            kind = _FALSE[1 if fits else 2 if mistake["truth"] else 0]
        boxes.setdefault(kind, []).append(json.loads(mistake["box"]))  # "confused" has classes
    return {k: np.histogram(_sides(b), _EDGES)[0].tolist() for k, b in boxes.items()}


def plot_curves(content: report.Content, file: Path) -> None:
    """Draw each model's AP over the iterations: a line a seed, and their mean."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for name, model in content["models"].items():
        iterations, aps = np.moveaxis(np.array(model["curves"], dtype=float), 2, 0)
        (mean,) = axis.plot(iterations[0], aps.mean(axis=0), "o-", label=name)
        axis.plot(iterations.T, aps.T, color=mean.get_color(), alpha=0.3, linewidth=1)
    axis.set(
        xlabel="iterations", ylabel="mask AP, validation images", xlim=(0, None), ylim=(0, None)
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110)


def blocks(content: report.Content) -> dict[str, str]:
    """The page's parts that are measured, by their names."""
    models = content["models"]
    data = [[name, *(f"{value:,}" for value in of)] for name, of in content["data"].items()]
    rows = [
        [name, *_scores(m["results"]), report.spread(m["minutes"])] for name, m in models.items()
    ]
    many = [[*map(str, m["limits"]), *_scores(m["results"])] for m in content["many"]]
    measured = {
        MODELS[name][0]: report.collect(m["results"])
        for name, m in models.items()
        if not MODELS[name][1]
    }
    measured["table2e_mask_branch/fcn"] = measured[_ROW]  # the same config
    claims = [claim for claim in CLAIMS if claim.configs() <= measured.keys()]
    sides = ["side, 1%", "10%", "median", "90%", "99%"]
    return {
        "how": (
            f"Written by `{content['command']}`: {content['seeds']} seeds of each model, "
            f"{content['minutes']} minutes together, {content['jobs']} at a time, on "
            f"{content['environment']}. AP in points; mean ± standard deviation over the seeds."
        ),
        "data": report.markdown(["", "images", "nuclei", "most", *sides], data),
        "models": report.markdown(["", *_SCORES, "minutes"], rows),
        "claims": report.claims_table(claims, measured),
        "many": report.markdown(["detections", "proposals", *_SCORES], many),
        "errors": _errors_table(content["errors"]),
    }


def _scores(results: Sequence[Mapping[str, Any]]) -> list[str]:
    found = report.collect(results)
    masks = [report.spread(found["segm"][metric]) for metric in ("AP", "AP50", "AP75")]
    times = report.spread([result["ms_per_image"] for result in results])
    return [*masks, report.spread(found["bbox"]["AP"]), times]


def _errors_table(seeds: Sequence[Mapping[str, Sequence[int]]]) -> str:
    nothing = [0] * (len(_EDGES) - 1)
    kinds = dict.fromkeys(kind for seed in seeds for kind in seed)
    mean = {kind: np.mean([seed.get(kind, nothing) for seed in seeds], axis=0) for kind in kinds}
    headers = ["side", *(f"false: {kind}" if kind in _FALSE else kind for kind in kinds)]
    lines = [
        [f"{low} to {high}", *(f"{of_kind[size]:.0f}" for of_kind in mean.values())]
        for size, (low, high) in enumerate(pairwise(_EDGES))
    ]
    return report.markdown(headers, lines)
