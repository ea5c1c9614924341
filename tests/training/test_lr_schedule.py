"""The schedules of the configs."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from detectron2.config import instantiate

from mask_rcnn_plugin import get_config

ROW = "table2a_backbone/r50_fpn"


def schedule(row: str, *overrides: str) -> Callable[[int], float]:
    """Iteration -> what the learning rate is multiplied by."""
    cfg = get_config(row, list(overrides))
    multiplier, max_iter = instantiate(cfg.lr_multiplier), cfg.train.max_iter
    return lambda iteration: multiplier(iteration / max_iter)


def test_paper_schedule_of_160k() -> None:
    at = map(schedule(ROW), (0, 500, 1000, 119_999, 120_000, 159_999))
    assert list(at) == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1])


def test_keypoint_schedule_of_90k() -> None:
    at = map(schedule("table5_multitask/box_only"), (1000, 59_999, 60_000, 79_999, 80_000))
    assert list(at) == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_a_shorter_training_keeps_the_shape_and_the_warm_up() -> None:
    at = map(schedule(ROW, "train.max_iter=8000"), (0, 500, 1000, 5999, 6000, 7999))
    assert list(at) == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1])


def test_a_training_shorter_than_the_warm_up_warms_up_all_along() -> None:
    values = list(map(schedule(ROW, "train.max_iter=10"), range(10)))
    assert values[0] == pytest.approx(0.001)
    assert all(a < b for a, b in pairwise(values))


@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_a_training_of_a_few_iterations(max_iter: int) -> None:
    warm = "lr_multiplier.warmup_length.iterations=0"
    assert schedule("table5_multitask/box_only", f"train.max_iter={max_iter}", warm)(0) == 1


def test_the_warm_up_is_set_in_iterations() -> None:
    at = schedule(ROW, "train.max_iter=1000", "lr_multiplier.warmup_length.iterations=100")
    assert [at(50), at(100), at(749), at(750)] == pytest.approx([0.5005, 1, 1, 0.1])
