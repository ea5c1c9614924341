"""Check and evaluation of made-up data at a small size."""

from typing import Any

import pytest

from benchmark import memory
from benchmark.memory import dataset_check, evaluation_memory


def test_a_made_up_data_set_is_checked_and_measured() -> None:
    measured = dataset_check(images=30, annotations=200)
    assert (measured["images"], measured["annotations"]) == (30, 200)
    assert 0.01 < measured["file_mb"] < 1
    assert 0 < measured["seconds"] < 60
    assert measured["grown_mb"] is None or measured["grown_mb"] < 100


def test_errors_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def truth_with_another_image(*args: Any) -> dict[str, Any]:
        truth = make_up(*args)
        truth["annotations"][0]["image_id"] = 99
        return truth

    make_up = memory.made_up_ground_truth
    monkeypatch.setattr(memory, "made_up_ground_truth", truth_with_another_image)
    with pytest.raises(ValueError, match="error"):
        dataset_check(images=5, annotations=20)


def test_memory_of_an_evaluation_is_measured() -> None:
    measured = evaluation_memory(images=7)
    assert measured["images"] == 7
    assert measured["seconds"] > 0
    assert measured["grown_mb"] is None or measured["grown_mb"] < 100
