"""The numbers of the paper, each with its table, row, metric and split.

One place for what config docstrings quote and `eval.py` and `tools/reproduce.py` print beside a
measurement. AP is in points (0 to 100). What the paper concludes from them is in claims.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

TASKS = {"segm": "mask", "bbox": "box", "keypoints": "keypoint"}
MINIVAL, TEST_DEV = "minival", "test-dev"

_COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl")


class Table(NamedTuple):
    """One comparison of the paper.

    place: where it stands in the paper.
    title: what is compared.
    baseline: config of another table's row that the text compares with, or "".
    baseline_name: what that row is called beside those of this table.
    """

    place: str
    title: str
    baseline: str = ""
    baseline_name: str = ""


TABLES = {
    "1": Table("Table 1", "instance segmentation against other systems"),
    "2a": Table("Table 2a", "backbones"),
    "2b": Table("Table 2b", "per-class sigmoid masks against softmax over classes, R50-C4"),
    "class_agnostic": Table(
        *("Sec. 4.2", "class-agnostic masks, R50-C4"),
        *("table2a_backbone/r50_c4", "class-specific masks"),
    ),
    "2c": Table("Table 2c", "RoI layers, R50-C4"),
    "2d": Table("Table 2d", "RoI layers at stride 32, R50-C5"),
    "fpn_roi_layer": Table(
        "Sec. 4.2", "RoI layers, R50-FPN", "table2a_backbone/r50_fpn", "RoIAlign"
    ),
    "2e": Table("Table 2e", "mask branches, R50-FPN"),
    "3": Table("Table 3", "object detection against other systems"),
    "4": Table("Table 4", "keypoints against other systems, R50-FPN"),
    "5": Table("Table 5", "boxes, masks and keypoints of persons together, R50-FPN"),
    "6": Table("Table 6", "RoI layers for keypoints, R50-FPN"),
    "timing": Table("Sec. 4.4", "inference time"),
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    table: key of `TABLES`.
    name: what the paper calls it.
    config: short name of the config, "" for other people's systems.
    split: "minival" or "test-dev".
    scores: {task: {metric: AP in points}}, keyed as results.json is; {} where the paper gives none.
    milliseconds: an image takes at inference on a Tesla M40, where the paper says so.
    note: what the paper says of the row in words.
    """

    table: str
    name: str
    config: str
    split: str
    scores: Mapping[str, Mapping[str, float]]
    milliseconds: float | None = None
    note: str = ""

    def summary(self) -> str:
        """The row in one sentence, as its config's docstring quotes it."""
        parts = [
            f"{TASKS[task]} " + ", ".join(f"{metric} {value:.1f}" for metric, value in m.items())
            for task, m in self.scores.items()
        ]
        if parts:
            parts = [f"{'; '.join(parts)} on {self.split}"]
        if self.milliseconds:
            parts.append(f"{self.milliseconds:.0f} ms an image on a Tesla M40")
        if self.note:
            parts.append(self.note)
        return f"{TABLES[self.table].place}, {self.name}: {'; '.join(parts)}."


def _scores(task: str, *values: float) -> dict[str, dict[str, float]]:
    """One task's values, in the order in which the paper prints them."""
    metrics = _KEYPOINT_METRICS if task == "keypoints" else _COCO_METRICS
    return {task: dict(zip(metrics, values))}


def _segm(*values: float) -> dict[str, dict[str, float]]:
    return _scores("segm", *values)


def _bbox(*values: float) -> dict[str, dict[str, float]]:
    return _scores("bbox", *values)


def _keypoints(*values: float) -> dict[str, dict[str, float]]:
    return _scores("keypoints", *values)


_SYSTEMS_1 = {
    "MNC, ResNet-101-C4": _segm(24.6, 44.3, 24.8, 4.7, 25.9, 43.6),
    "FCIS+OHEM, ResNet-101-C5-dilated": {
        "segm": {"AP": 29.2, "AP50": 49.5, "APs": 7.1, "APm": 31.3, "APl": 50.0}
    },
    "FCIS+++ +OHEM, ResNet-101-C5-dilated": _segm(33.6, 54.5),
}
_SYSTEMS_3 = {
    "Faster R-CNN+++, ResNet-101-C4": _bbox(34.9, 55.7, 37.4, 15.6, 38.7, 50.9),
    "Faster R-CNN w FPN, ResNet-101-FPN": _bbox(36.2, 59.1, 39.0, 18.2, 39.0, 48.2),
    "Faster R-CNN by G-RMI, Inception-ResNet-v2": _bbox(34.7, 55.5, 36.7, 13.5, 38.1, 52.0),
    "Faster R-CNN w TDM, Inception-ResNet-v2-TDM": _bbox(36.8, 57.7, 39.2, 16.2, 39.8, 52.1),
}
_SYSTEMS_4 = {
    "CMU-Pose+++": _keypoints(61.8, 84.9, 67.5, 57.1, 68.2),
    "G-RMI": _keypoints(62.4, 84.0, 68.5, 59.1, 68.1),
}

# Values that stand in several tables of the paper.
_R50_C4 = _segm(30.3, 51.2, 31.5)
_R50_FPN = _segm(33.6, 55.2, 35.3)

_OVERHEAD = "Mask R-CNN takes about 20% longer on typical models (Sec. 3.1)"

ROWS = (
    *(Row("1", name, "", TEST_DEV, scores) for name, scores in _SYSTEMS_1.items()),
    Row(
        *("1", "ResNet-101-C4", "table1_main/r101_c4", TEST_DEV),
        _segm(33.1, 54.9, 34.8, 12.1, 35.6, 51.1),
    ),
    Row(
        *("1", "ResNet-101-FPN", "table1_main/r101_fpn", TEST_DEV),
        _segm(35.7, 58.0, 37.8, 15.5, 38.1, 52.4),
    ),
    Row(
        *("1", "ResNeXt-101-FPN", "table1_main/x101_fpn", TEST_DEV),
        _segm(37.1, 60.0, 39.4, 16.9, 39.9, 53.5),
    ),
    Row("2a", "ResNet-50-C4", "table2a_backbone/r50_c4", MINIVAL, _R50_C4),
    Row("2a", "ResNet-101-C4", "table2a_backbone/r101_c4", MINIVAL, _segm(32.7, 54.2, 34.3)),
    Row("2a", "ResNet-50-FPN", "table2a_backbone/r50_fpn", MINIVAL, _R50_FPN),
    Row("2a", "ResNet-101-FPN", "table2a_backbone/r101_fpn", MINIVAL, _segm(35.4, 57.3, 37.5)),
    Row("2a", "ResNeXt-101-FPN", "table2a_backbone/x101_fpn", MINIVAL, _segm(36.7, 59.5, 38.9)),
    Row("2b", "softmax", "table2b_mask_loss/softmax", MINIVAL, _segm(24.8, 44.1, 25.1)),
    Row("2b", "sigmoid", "table2b_mask_loss/sigmoid", MINIVAL, _R50_C4),
    Row("class_agnostic", "class-agnostic masks", "class_agnostic/r50_c4", MINIVAL, _segm(29.7)),
    Row("2c", "RoIPool, max", "table2c_roi_layer/roipool_max", MINIVAL, _segm(26.9, 48.8, 26.4)),
    Row("2c", "RoIWarp, max", "table2c_roi_layer/roiwarp_max", MINIVAL, _segm(27.2, 49.2, 27.1)),
    Row("2c", "RoIWarp, ave", "table2c_roi_layer/roiwarp_ave", MINIVAL, _segm(27.1, 48.9, 27.1)),
    Row("2c", "RoIAlign, max", "table2c_roi_layer/roialign_max", MINIVAL, _segm(30.2, 51.0, 31.8)),
    Row("2c", "RoIAlign, ave", "table2c_roi_layer/roialign_ave", MINIVAL, _R50_C4),
    Row(
        *("2d", "RoIPool", "table2d_stride32/roipool", MINIVAL),
        {**_segm(23.6, 46.5, 21.6), **_bbox(28.2, 52.7, 26.9)},
    ),
    Row(
        *("2d", "RoIAlign", "table2d_stride32/roialign", MINIVAL),
        {**_segm(30.9, 51.8, 32.1), **_bbox(34.0, 55.3, 36.4)},
    ),
    Row(
        *("fpn_roi_layer", "RoIPool", "fpn_roi_layer/roipool", MINIVAL, {}),
        note="RoIAlign gains 1.5 mask AP and 0.5 box AP over it",
    ),
    Row(
        *("2e", "MLP 1024-1024-80*28^2", "table2e_mask_branch/mlp_2fc", MINIVAL),
        _segm(31.5, 53.7, 32.8),
    ),
    Row(
        *("2e", "MLP 1024-1024-1024-80*28^2", "table2e_mask_branch/mlp_3fc", MINIVAL),
        _segm(31.5, 54.0, 32.6),
    ),
    Row("2e", "FCN 256-256-256-256-256-80", "table2e_mask_branch/fcn", MINIVAL, _R50_FPN),
    *(Row("3", name, "", TEST_DEV, scores) for name, scores in _SYSTEMS_3.items()),
    Row(
        *("3", "Faster R-CNN, RoIAlign, ResNet-101-FPN", "table3_box/faster_rcnn_r101_fpn"),
        *(TEST_DEV, _bbox(37.3, 59.6, 40.3, 19.8, 40.2, 48.8)),
    ),
    Row(
        *("3", "Mask R-CNN, ResNet-101-FPN", "table3_box/mask_rcnn_r101_fpn", TEST_DEV),
        _bbox(38.2, 60.3, 41.7, 20.1, 41.1, 50.2),
    ),
    Row(
        *("3", "Mask R-CNN, ResNeXt-101-FPN", "table3_box/mask_rcnn_x101_fpn", TEST_DEV),
        _bbox(39.8, 62.3, 43.4, 22.1, 43.2, 51.2),
    ),
    *(Row("4", name, "", TEST_DEV, scores) for name, scores in _SYSTEMS_4.items()),
    Row(
        *("4", "keypoint-only", "table4_keypoints/keypoint_only", TEST_DEV),
        _keypoints(62.7, 87.0, 68.4, 57.4, 71.1),
    ),
    Row(
        *("4", "keypoint & mask", "table4_keypoints/keypoint_and_mask", TEST_DEV),
        _keypoints(63.1, 87.3, 68.7, 57.8, 71.4),
    ),
    Row("5", "Faster R-CNN", "table5_multitask/box_only", MINIVAL, _bbox(52.5)),
    Row(
        *("5", "Mask R-CNN, mask-only", "table5_multitask/mask_only", MINIVAL),
        {**_bbox(53.6), **_segm(45.8)},
    ),
    Row(
        *("5", "Mask R-CNN, keypoint-only", "table5_multitask/keypoint_only", MINIVAL),
        {**_bbox(50.7), **_keypoints(64.2)},
    ),
    Row(
        *("5", "Mask R-CNN, keypoint & mask", "table5_multitask/keypoint_and_mask", MINIVAL),
        {**_bbox(52.0), **_segm(45.1), **_keypoints(64.7)},
    ),
    Row(
        *("6", "RoIPool", "table6_keypoint_roi/roipool", MINIVAL),
        _keypoints(59.8, 86.2, 66.7, 55.1, 67.4),
    ),
    Row(
        *("6", "RoIAlign", "table6_keypoint_roi/roialign", MINIVAL),
        _keypoints(64.2, 86.6, 69.7, 58.7, 73.0),
    ),
    Row(
        *("timing", "ResNet-101-FPN", "timing/r101_fpn", MINIVAL, {}),
        milliseconds=195,
        note="and 15 ms on a CPU to resize the outputs",
    ),
    Row(
        *("timing", "ResNet-101-C4", "timing/r101_c4", MINIVAL, {}),
        milliseconds=400,
        note='written "~400ms"',
    ),
    Row(
        *("timing", "Faster R-CNN, ResNet-101-FPN", "timing/faster_rcnn_r101_fpn", MINIVAL, {}),
        note=_OVERHEAD,
    ),
    Row(
        *("timing", "Faster R-CNN, ResNet-101-C4", "timing/faster_rcnn_r101_c4", MINIVAL, {}),
        note=_OVERHEAD,
    ),
)


def rows_of(table: str) -> list[Row]:
    """A table's rows, the baseline that its text compares with first.

    Raises:
        KeyError: if there is no such table.
    """
    if table not in TABLES:
        raise KeyError(f"no table {table!r} in the paper, there is {list(TABLES)}")
    *_, baseline, name = TABLES[table]
    compared = [replace(r, name=name) for r in ROWS if baseline and r.config == baseline]
    return compared + [r for r in ROWS if r.table == table]


def row_of(config: str) -> Row | None:
    """The row that a config stands for; None for any other config."""
    return next((r for r in ROWS if r.config == config and config), None)
