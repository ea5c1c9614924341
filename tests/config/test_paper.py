"""The paper's numbers, against its own arithmetic."""

import pytest

from mask_rcnn_plugin.config.paper import ROWS, TABLES, TASKS, row_of, rows_of


def scores(config: str, task: str) -> list[float]:
    row = row_of(config)
    assert row is not None
    return list(row.scores[task].values())


@pytest.mark.parametrize(
    ("better", "worse", "task", "gains"),
    [  # differences that the paper prints itself
        ("table2b_mask_loss/sigmoid", "table2b_mask_loss/softmax", "segm", [5.5, 7.1, 6.4]),
        ("table2d_stride32/roialign", "table2d_stride32/roipool", "segm", [7.3, 5.3, 10.5]),
        ("table2d_stride32/roialign", "table2d_stride32/roipool", "bbox", [5.8, 2.6, 9.5]),
        ("table3_box/mask_rcnn_r101_fpn", "table3_box/faster_rcnn_r101_fpn", "bbox", [0.9]),
        ("table3_box/mask_rcnn_x101_fpn", "table3_box/mask_rcnn_r101_fpn", "bbox", [1.6]),
        ("table6_keypoint_roi/roialign", "table6_keypoint_roi/roipool", "keypoints", [4.4]),
        ("table2e_mask_branch/fcn", "table2e_mask_branch/mlp_2fc", "segm", [2.1]),
    ],
)
def test_gains_that_the_paper_prints(
    better: str, worse: str, task: str, gains: list[float]
) -> None:
    found = [a - b for a, b in zip(scores(better, task), scores(worse, task))]
    assert found[: len(gains)] == pytest.approx(gains)


def test_values_that_stand_in_two_tables_are_the_same() -> None:
    assert scores("table6_keypoint_roi/roialign", "keypoints")[0] == 64.2
    assert scores("table5_multitask/keypoint_only", "keypoints") == [64.2]
    for config in ("table2b_mask_loss/sigmoid", "table2c_roi_layer/roialign_ave"):
        assert scores(config, "segm") == scores("table2a_backbone/r50_c4", "segm")


def test_rows_are_well_formed() -> None:
    for row in ROWS:
        assert row.table in TABLES
        assert row.split in ("minival", "test-dev")
        assert row.scores or row.milliseconds or row.note, row
        for task, metrics in row.scores.items():
            assert task in TASKS
            for metric, value in metrics.items():
                assert metric in ("AP", "AP50", "AP75", "APs", "APm", "APl")
                assert 0 < value < 100
            assert metrics["AP"] < metrics.get("AP50", 100)
    assert {row.table for row in ROWS} == set(TABLES)


def test_fcis_has_no_ap75_in_the_paper() -> None:
    (fcis,) = [r for r in ROWS if r.name.startswith("FCIS+OHEM")]
    assert fcis.scores["segm"] == {"AP": 29.2, "AP50": 49.5, "APs": 7.1, "APm": 31.3, "APl": 50.0}


def test_summary_is_a_sentence() -> None:
    row = row_of("table2d_stride32/roipool")
    assert row is not None
    assert row.summary() == (
        "Table 2d, RoIPool: mask AP 23.6, AP50 46.5, AP75 21.6; box AP 28.2, AP50 52.7, AP75 26.9 "
        "on minival."
    )
    timed = row_of("timing/r101_c4")
    assert timed is not None
    assert (
        timed.summary()
        == 'Sec. 4.4, ResNet-101-C4: 400 ms an image on a Tesla M40; written "~400ms".'
    )


def test_a_table_of_the_text_begins_with_what_it_compares_with() -> None:
    configs = [row.config for row in rows_of("class_agnostic")]
    assert configs == ["table2a_backbone/r50_c4", "class_agnostic/r50_c4"]
    assert [row.name for row in rows_of("fpn_roi_layer")] == ["RoIAlign", "RoIPool"]


def test_no_row_for_other_configs() -> None:
    assert row_of("mine") is None
    assert row_of("") is None
