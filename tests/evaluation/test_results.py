"""results.json, and the numbers as a table."""

import json
from pathlib import Path
from types import SimpleNamespace

from mask_rcnn_plugin.evaluation.results import results_table, write_results


def evaluator(max_detections: int = 100) -> SimpleNamespace:
    return SimpleNamespace(
        dataset_name="set", backend="pycocotools 2", max_detections=max_detections
    )


def test_results_file_has_null_for_what_could_not_be_computed(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "results.json"
    metrics = {"AP": 12.5, "APl": float("nan")}
    write_results(file, {"bbox": metrics}, evaluator(), ms_per_image=3.14159)
    assert json.loads(file.read_text()) == {
        "dataset": "set",
        "bbox": {"AP": 12.5, "APl": None},
        "evaluator": "pycocotools 2",
        "ms_per_image": 3.14,
    }


def test_results_file_names_another_limit_than_cocos(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", {}, evaluator(max_detections=300))
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["max_detections"] == 300
    assert content["ms_per_image"] is None
    assert content["evaluator"].startswith("none")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_table_leaves_out_what_a_task_has_not() -> None:
    metrics = {"AP": 12.34, "AP50": 50.0, "AP75": 5.0, "APm": 1.0, "APl": 2.0}
    table = results_table({"keypoints": metrics})
    assert cells(table.splitlines()[2]) == ["keypoints", "12.3", "50.0", "5.0", "", "1.0", "2.0"]


def test_results_table_has_the_papers_values_below_ours() -> None:
    ours = {"bbox": {"AP": 1.0, "AP50": 2.0}, "segm": {"AP": 3.0}}
    table = results_table(ours, {"segm": {"AP": 30.3, "AP75": 31.5}, "keypoints": {"AP": 9.0}})
    assert [cells(line)[:4] for line in table.splitlines()[2:]] == [
        ["bbox", "1.0", "2.0", ""],
        ["segm", "3.0", "", ""],
        ["segm (paper)", "30.3", "", "31.5"],
    ]
