"""The report on made-up measurements."""

import itertools
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mask_rcnn_plugin.config.paper import TABLES
from reproduce import report
from reproduce.claims import CLAIMS, Effect, Measured
from reproduce.report import (
    Block,
    claim_records,
    claim_rows,
    claims_of,
    collect,
    columns_of,
    plot_effects,
    plot_predictions,
    table_rows,
    to_html,
    to_markdown,
)


def scores(*values: float) -> dict[str, list[float]]:
    """AP of each seed; AP75 a point less, AP50 a point more."""
    return {f"AP{n}": [v + d for v in values] for n, d in (("", 0.0), ("50", 1.0), ("75", -1.0))}


MEASURED = {
    "table2d_stride32/roipool": {"segm": scores(10, 12), "bbox": scores(20, 22)},
    "table2d_stride32/roialign": {"segm": scores(19, 20), "bbox": scores(27, 29)},
}


def test_results_of_the_seeds_are_collected() -> None:
    first = {"dataset": "x", "segm": {"AP": 1.5, "APl": None, "AP-person": 3.0}, "ms_per_image": 9}
    second = {**first, "segm": {"AP": 2.5, "APl": None, "AP-person": 4.0}}
    (task,) = collect([first, second]).items()
    assert task == ("segm", {"AP": [1.5, 2.5], "APl": pytest.approx([np.nan] * 2, nan_ok=True)})
    assert collect([{"dataset": "x"}]) == {}


def test_columns_are_what_the_paper_compares() -> None:
    assert columns_of("2c") == [("segm", "AP"), ("segm", "AP50"), ("segm", "AP75")]
    assert columns_of("5") == [("segm", "AP"), ("bbox", "AP"), ("keypoints", "AP")]
    # boxes of this one are compared in words alone
    assert ("bbox", "AP") in columns_of("fpn_roi_layer")


def test_a_table_has_the_papers_line_and_ours() -> None:
    iterations = {"table2d_stride32/roipool": 1300}
    minutes = {"table2d_stride32/roipool": [2.0, 3.0]}
    headers, lines = table_rows("2d", MEASURED, iterations, minutes, {})
    assert headers[:5] == ["row", "", "mask AP", "mask AP50", "mask AP75"]
    assert lines[0][:5] == ["RoIPool", "paper (minival)", "23.6", "46.5", "21.6"]
    assert lines[1][:5] == ["", "ours", "11.0 ± 1.4", "12.0 ± 1.4", "10.0 ± 1.4"]
    assert lines[3][5] == "28.0 ± 1.4"
    assert headers[-2:] == ["iterations", "minutes"]
    assert [line[-2:] for line in lines] == [["", ""], ["1300", "2.5 ± 0.7"], ["", ""], ["", ""]]


def test_rows_that_were_not_run_say_so_and_other_systems_have_no_line_of_ours() -> None:
    _, lines = table_rows("4", {}, {}, {}, {})
    assert [line[:2] for line in lines] == [
        *(["CMU-Pose+++", "paper (test-dev)"], ["G-RMI", "paper (test-dev)"]),
        *(["keypoint-only", "paper (test-dev)"], ["", "ours: not done"]),
        *(["keypoint & mask", "paper (test-dev)"], ["", "ours: not done"]),
    ]


def test_a_row_without_annotations_to_test_on_names_its_submission() -> None:
    _, lines = table_rows("1", {"table1_main/r101_c4": {}}, {}, {}, {})
    (ours,) = [b for a, b in itertools.pairwise(lines) if a[0] == "ResNet-101-C4"]
    assert ours[1] == "ours: see its submission/"


NO_LARGE = {"AP": [1.0, 2.0, 3.0], "APl": [float("nan")] * 3}


def test_an_ap_that_coco_does_not_define_is_said_so(tmp_path: Path) -> None:
    measured = {
        f"table6_keypoint_roi/{x}": {"keypoints": NO_LARGE} for x in ("roipool", "roialign")
    }
    headers, lines = table_rows("6", measured, {}, {}, {})
    assert lines[1][headers.index("keypoint AP")] == "2.0 ± 1.0"
    assert lines[1][headers.index("keypoint APl")] == "n/a"
    none = dict.fromkeys(("AP", "AP50", "AP75"), NO_LARGE["APl"])
    nan = {c: {"keypoints": none} for c in measured}
    _, ((*_, effect, _than, verdict),) = claim_rows(claims_of("6"), nan)
    assert (effect, verdict) == ("n/a", "no AP")
    (record,) = claim_records(claims_of("6"), nan)
    assert record["measured"] == [None] * 3
    plot_effects("6", nan, tmp_path / "plot.png")


def test_times_stand_where_the_paper_gives_times() -> None:
    headers, lines = table_rows("timing", {}, {}, {}, {"timing/r101_c4": 123.4})
    assert headers[-3] == "ms an image"
    found = {line[0]: (line[-3], ours[-3]) for line, ours in zip(lines[::2], lines[1::2])}
    assert found["ResNet-101-C4"] == ("400", "123")
    assert found["Faster R-CNN, ResNet-101-FPN"] == ("", "")


def test_claims_of_a_table_need_no_other_row() -> None:
    assert [c.text for c in claims_of("2d")] == [
        "RoIAlign beats RoIPool at stride 32 (Table 2d)",
        "... boxes too (Table 2d)",
    ]
    assert len(claims_of("class_agnostic")) == 1
    settled = {c.text for table in TABLES for c in claims_of(table)}
    across = {c.text for c in CLAIMS} - settled
    assert across == {
        "... more than at stride 16 (Tables 2d, 2c)",
        "... by more than for masks on an FPN (Table 6, Sec. 4.2)",
    }


def test_claims_are_set_beside_the_paper() -> None:
    _, (masks, boxes) = claim_rows(claims_of("2d"), MEASURED)
    assert masks[1:] == ["mask AP", "+7.3", "+8.5 ± 0.7", "", "agrees"]
    assert boxes[1:] == ["box AP", "+5.8", "+7.0 ± 0.0", "", "agrees"]
    record, _ = claim_records(claims_of("2d"), MEASURED)
    assert (record["paper"], record["measured"], record["verdict"]) == (7.3, [9, 8], "agrees")
    _, lines = claim_rows(CLAIMS, {})
    assert {line[-1] for line in lines} == {"not run"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Effect]:
    """The effects that a plot shows."""
    effects: list[Effect] = []
    draw = report._plot_effect

    def record(axis: Any, y: int, effect: Effect, measured: Measured) -> None:
        effects.append(effect)
        draw(axis, y, effect, measured)

    monkeypatch.setattr(report, "_plot_effect", record)
    return effects


def test_effects_are_drawn_against_the_last_row(tmp_path: Path, drawn: list[Effect]) -> None:
    plot_effects("2d", MEASURED, tmp_path / "plot.png")
    pair = ("table2d_stride32/roipool", "table2d_stride32/roialign")
    assert drawn == [
        Effect(*pair, task, metric)
        for task in ("segm", "bbox")
        for metric in ("AP", "AP50", "AP75")
    ]
    pixels = cv2.imread(str(tmp_path / "plot.png"))
    assert ((pixels[..., 2] > 150) & (pixels[..., 1] < 100)).sum() > 100, "nothing of ours"
    assert (pixels.max(-1) < 30).sum() > 100, "nothing of the paper's"


def test_effects_are_drawn_against_the_row_of_the_text(tmp_path: Path, drawn: list[Effect]) -> None:
    measured = {
        "table2a_backbone/r50_fpn": {"segm": scores(20), "bbox": scores(30)},
        "fpn_roi_layer/roipool": {"segm": scores(19), "bbox": scores(30)},
    }
    plot_effects("fpn_roi_layer", measured, tmp_path / "plot.png")
    assert {(e.config, e.against) for e in drawn} == {
        ("fpn_roi_layer/roipool", "table2a_backbone/r50_fpn")
    }
    paper = {(e.task, e.metric): e.in_paper() for e in drawn if e.metric == "AP"}
    assert paper == {("segm", "AP"): -1.5, ("bbox", "AP"): -0.5}


def test_effects_of_table_5_are_against_the_first_row_that_has_the_task(
    tmp_path: Path, drawn: list[Effect]
) -> None:
    measured = {
        "table5_multitask/box_only": {"bbox": scores(30, 31)},
        "table5_multitask/mask_only": {"bbox": scores(31, 32), "segm": scores(20, 21)},
        "table5_multitask/keypoint_and_mask": {"bbox": scores(29, 32), "segm": scores(20, 22)},
    }
    plot_effects("5", measured, tmp_path / "plot.png")
    assert [(e.config.split("/")[1], e.against.split("/")[1], e.task) for e in drawn] == [
        ("keypoint_and_mask", "mask_only", "segm"),
        ("mask_only", "box_only", "bbox"),
        ("keypoint_and_mask", "box_only", "bbox"),
    ]


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    plot.write_text("an earlier one")
    plot_effects("2d", {}, plot)
    assert not plot.exists()
    one = {"table2d_stride32/roialign": MEASURED["table2d_stride32/roialign"]}
    plot_effects("2d", one, plot)
    assert not plot.exists()


def test_pictures_are_drawn(tmp_path: Path) -> None:
    red, blue = (np.full((40, 40, 3), c, np.uint8) for c in ([255, 0, 0], [0, 0, 255]))
    plot_predictions({"truth": red, "ours": blue, "more": red}, tmp_path / "p.jpg", columns=2)
    pixels = cv2.imread(str(tmp_path / "p.jpg")).astype(int)
    height, width, _ = pixels.shape
    top_right = pixels[: height // 2, width // 2 :]
    assert (top_right[..., 0] - top_right[..., 2]).max() > 200  # BGR
    assert (top_right[..., 2] - top_right[..., 0]).max() < 100


def test_page_in_markdown_and_html(tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "a.png"
    picture.parent.mkdir()
    cv2.imwrite(str(picture), np.zeros((4, 4, 3), np.uint8))
    blocks = [
        Block("Title", level=1),
        Block("a < b"),
        Block(headers=["x", "y"], rows=[["1.50", "<2>"]]),
        Block("what is seen", picture=picture),
    ]
    markdown = to_markdown(blocks, tmp_path)
    assert markdown.startswith("# Title\n\na < b\n\n| x    | y   |\n")
    assert "| 1.50 | <2> |" in markdown
    assert "![what is seen](plots/a.png)" in markdown

    page = to_html(blocks, "Title")
    assert "<h1>Title</h1>" in page
    assert "<p>a &lt; b</p>" in page
    assert "&lt;2&gt;" in page
    assert re.search(r'<img alt="what is seen" src="data:image/png;base64,iVBOR', page)
    assert str(tmp_path) not in page
