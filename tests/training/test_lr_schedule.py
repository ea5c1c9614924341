from itertools import pairwise

import pytest

from mask_rcnn_plugin.training import warmup_multistep


def test_paper_schedule_of_160k() -> None:
    schedule = warmup_multistep(160_000, drop_at=[120 / 160], warmup_iters=1000)
    at = [schedule(i / 160_000) for i in (0, 500, 1000, 119_999, 120_000, 159_999)]
    assert at == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1])


def test_shorter_training_keeps_the_shape() -> None:
    schedule = warmup_multistep(900, drop_at=[60 / 90, 80 / 90])
    assert [schedule(i / 900) for i in (0, 599, 600, 799, 800)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_training_shorter_than_the_warmup_warms_up_all_along() -> None:
    schedule = warmup_multistep(10, drop_at=[0.5], warmup_iters=1000)
    values = [schedule(i / 10) for i in range(10)]
    assert values[0] == pytest.approx(0.001)
    assert all(a < b for a, b in pairwise(values))


@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_training_of_a_few_iterations(max_iter: int) -> None:
    schedule = warmup_multistep(max_iter, drop_at=[60 / 90, 80 / 90])
    assert schedule(0) == 1


@pytest.mark.parametrize("drop_at", [[0.5, 0.4], [0.0], [1.0], [1.5]])
def test_drops_out_of_order_are_refused(drop_at: list[float]) -> None:
    with pytest.raises(ValueError, match="must be increasing fractions"):
        warmup_multistep(10, drop_at=drop_at)


def test_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_iters is -1"):
        warmup_multistep(10, drop_at=[0.5], warmup_iters=-1)
