import logging

import pytest
from detectron2.engine import TrainerBase

from mask_rcnn_plugin.training.zero_loss import ZeroLossWarning


class Losses(TrainerBase):
    """A trainer that only reports."""

    def __init__(self, losses: dict[str, list[float]]) -> None:
        super().__init__()
        self._losses = losses
        self.register_hooks([ZeroLossWarning(iterations=3)])

    def run_step(self) -> None:
        self.storage.put_scalar("data_time", 0.0)
        for name, values in self._losses.items():
            if self.iter < len(values):
                self.storage.put_scalar(name, values[self.iter])


def own_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Without detectron2's, whose level other tests may have set."""
    return [record for record in caplog.records if record.name == ZeroLossWarning.__module__]


def test_a_loss_that_stays_zero_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    Losses({"loss_keypoint": [1.0, *[0.0] * 7], "loss_mask": [1.0] * 8}).train(0, 8)
    (record,) = own_records(caplog)
    assert record.levelname == "WARNING"
    assert record.message.startswith("loss_keypoint has been 0 for 3 iterations")


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0, 0.5, 0.0, 0.0],  # not in a row
        [1.0, 0.0],  # a value that is no longer reported, as in a step left out
    ],
)
def test_a_loss_that_comes_and_goes_is_none(
    values: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    Losses({"loss_keypoint": values}).train(0, 6)
    assert not own_records(caplog)
