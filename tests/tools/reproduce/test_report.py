"""The report on made-up measurements."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mask_rcnn_plugin.config.paper import TABLES, rows_of
from reproduce import report
from reproduce.claims import CLAIMS, Effect, Measured
from reproduce.report import (
    claims_of,
    claims_table,
    collect,
    columns_of,
    index_page,
    plot_effects,
    plot_predictions,
    results_table,
    table_page,
)


def content(table: str, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a table's JSON file holds, of {config: results of each seed}."""
    rows = [
        {
            "name": row.name,
            "config": row.config,
            "results": results.get(row.config),
            "iterations": 1300 if row.config in results else None,
            "minutes": [2.0, 3.0] if row.config in results else [],
        }
        for row in rows_of(table)
    ]
    how = {"scale": "synthetic", "seeds": 2, "command": f"python x {table}", "jobs": 2}
    return {"table": table, **how, "environment": "a machine", "rows": rows}


def cells(table: str) -> list[list[str]]:
    """Of a table in Markdown, its headers first."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def score(value: float) -> dict[str, float]:
    """AP75 a point less than AP, AP50 a point more."""
    return {"AP": value, "AP50": value + 1, "AP75": value - 1}


def results(**tasks: tuple[float, ...]) -> list[dict[str, Any]]:
    """Of each seed, as results.json has it."""
    seeds = range(len(next(iter(tasks.values()))))
    return [{"ms_per_image": 9.0, **{t: score(v[s]) for t, v in tasks.items()}} for s in seeds]


TABLE_2D = content(
    "2d",
    {
        "table2d_stride32/roipool": results(segm=(10, 12), bbox=(20, 22)),
        "table2d_stride32/roialign": results(segm=(19, 20), bbox=(27, 29)),
    },
)


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
    headers, *lines = cells(results_table(TABLE_2D))
    assert headers[:5] == ["row", "", "mask AP", "mask AP50", "mask AP75"]
    assert headers[-2:] == ["iterations", "minutes"]
    assert lines[0] == [
        *("RoIPool", "paper (minival)", "23.6", "46.5", "21.6", "28.2", "52.7", "26.9", "", "")
    ]
    assert lines[1][:5] == ["", "ours", "11.0 ± 1.4", "12.0 ± 1.4", "10.0 ± 1.4"]
    assert lines[1][-2:] == ["1300", "2.5 ± 0.7"]
    assert lines[3][5] == "28.0 ± 1.4"


def test_rows_that_were_not_run_say_so_and_other_systems_have_no_line_of_ours() -> None:
    _, *lines = cells(results_table(content("4", {})))
    assert [line[:2] for line in lines] == [
        *(["CMU-Pose+++", "paper (test-dev)"], ["G-RMI", "paper (test-dev)"]),
        *(["keypoint-only", "paper (test-dev)"], ["", "ours: not done"]),
        *(["keypoint & mask", "paper (test-dev)"], ["", "ours: not done"]),
    ]


def test_a_row_without_annotations_to_test_on_names_its_submission() -> None:
    unscored = {"table1_main/r101_c4": [{"dataset": "test-dev", "ms_per_image": 9.0}]}
    _, *lines = cells(results_table(content("1", unscored)))
    names = [line[0] for line in lines]
    assert lines[names.index("ResNet-101-C4") + 1][1] == "ours: see its submission/"


def test_an_ap_that_coco_does_not_define_is_said_so(tmp_path: Path) -> None:
    none = {"AP": None, "AP50": None, "AP75": None, "APl": None}
    made = content(
        "6",
        {
            f"table6_keypoint_roi/{x}": [{"keypoints": {**none, **scores}}] * 2
            for x, scores in (("roipool", {}), ("roialign", {"AP": 2.0}))
        },
    )
    headers, *lines = cells(results_table(made))
    assert lines[1][headers.index("keypoint AP")] == "n/a"
    assert lines[3][headers.index("keypoint AP")] == "2.0 ± 0.0"
    assert lines[3][headers.index("keypoint APl")] == "n/a"
    _, claim = cells(claims_table(claims_of("6"), report.measured_in(made)))
    assert claim[3:] == ["n/a", "+7%, n/a", "", "no AP"]
    plot_effects(made, tmp_path / "plot.png")


def test_times_stand_where_the_paper_gives_times() -> None:
    timed = {"timing/r101_c4": [{"ms_per_image": 123.4}]}
    headers, *lines = cells(results_table(content("timing", timed)))
    assert headers[-3] == "ms an image"
    found = {line[0]: (line[-3], ours[-3]) for line, ours in zip(lines[::2], lines[1::2])}
    assert found["ResNet-101-C4"] == ("400", "123")
    assert found["Faster R-CNN, ResNet-101-FPN"] == ("", "")


def test_claims_of_a_table_need_no_other_row() -> None:
    assert len(claims_of("2d")) == 3
    assert len(claims_of("class_agnostic")) == 1
    settled = {c for table in TABLES for c in claims_of(table)}
    assert all(len({c.split("/")[0] for c in claim.configs()}) > 1 for claim in {*CLAIMS} - settled)


def test_claims_are_set_beside_the_paper() -> None:
    _, masks, boxes, _ = cells(claims_table(claims_of("2d"), report.measured_in(TABLE_2D)))
    assert masks[1:] == ["mask AP", "+7.3", "+8.5 ± 0.7", "+31%, +78%", "", "agrees"]
    assert boxes[1:] == ["box AP", "+5.8", "+7.0 ± 0.0", "+21%, +33%", "", "agrees"]
    assert claims_table(CLAIMS, {}) == ""


def test_pages() -> None:
    page = table_page(TABLE_2D)
    assert results_table(TABLE_2D) in page
    assert "](2d.png)" in page
    assert "](2d_pictures.jpg)" in page
    assert "](4.png)" not in table_page(content("4", {}))
    index = index_page([TABLE_2D, content("4", {})])
    assert "`python x 2d` and `python x 4`: 4 trainings (seeds a row: 2), 10 minutes" in index
    assert page.split("\n\n", 1)[1].strip() in index
    assert claims_table(CLAIMS, report.measured_in(TABLE_2D)) in index
    assert "not run" not in index
    assert "claims" not in index_page([content("4", {})])


def test_a_training_of_two_tables_counts_once() -> None:
    def rows(*minutes: float) -> dict[str, Any]:
        results = [{"segm": {"AP": m}} for m in minutes]
        return {"rows": [{"results": results, "minutes": [*minutes]}, {"results": None}]}

    assert sorted(report.minutes_of([rows(1, 2, 3), rows(1, 2), rows(4)])) == [1, 2, 3, 4]


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
    plot_effects(TABLE_2D, tmp_path / "plot.png")
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
        "table2a_backbone/r50_fpn": results(segm=(20,), bbox=(30,)),
        "fpn_roi_layer/roipool": results(segm=(19,), bbox=(30,)),
    }
    plot_effects(content("fpn_roi_layer", measured), tmp_path / "plot.png")
    assert {(e.config, e.against) for e in drawn} == {
        ("fpn_roi_layer/roipool", "table2a_backbone/r50_fpn")
    }
    paper = {(e.task, e.metric): e.in_paper() for e in drawn if e.metric == "AP"}
    assert paper == {("segm", "AP"): -1.5, ("bbox", "AP"): -0.5}


def test_effects_of_table_5_are_against_the_first_row_that_has_the_task(
    tmp_path: Path, drawn: list[Effect]
) -> None:
    measured = {
        "table5_multitask/box_only": results(bbox=(30, 31)),
        "table5_multitask/mask_only": results(bbox=(31, 32), segm=(20, 21)),
        "table5_multitask/keypoint_and_mask": results(bbox=(29, 32), segm=(20, 22)),
    }
    plot_effects(content("5", measured), tmp_path / "plot.png")
    assert [(e.config.split("/")[1], e.against.split("/")[1], e.task) for e in drawn] == [
        ("keypoint_and_mask", "mask_only", "segm"),
        ("mask_only", "box_only", "bbox"),
        ("keypoint_and_mask", "box_only", "bbox"),
    ]


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    plot.write_text("an earlier one")
    plot_effects(content("2d", {}), plot)
    assert not plot.exists()
    one = {"table2d_stride32/roialign": results(segm=(19, 20), bbox=(27, 29))}
    plot_effects(content("2d", one), plot)
    assert not plot.exists()


def test_pictures_are_drawn(tmp_path: Path) -> None:
    red, blue = (np.full((40, 40, 3), c, np.uint8) for c in ([255, 0, 0], [0, 0, 255]))
    plot_predictions({"truth": red, "ours": blue, "more": red}, tmp_path / "p.jpg", columns=2)
    pixels = cv2.imread(str(tmp_path / "p.jpg")).astype(int)
    height, width, _ = pixels.shape
    top_right = pixels[: height // 2, width // 2 :]
    assert (top_right[..., 0] - top_right[..., 2]).max() > 200  # BGR
    assert (top_right[..., 2] - top_right[..., 0]).max() < 100
