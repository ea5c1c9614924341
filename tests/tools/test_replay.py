import sys
from pathlib import Path

import pytest
import torch
from replay import main as run_replay

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.training.nonfinite import NonFiniteLossError
from train import do_train

CONFIG = "table4_keypoints/keypoint_and_mask+synthetic"


def replay(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["replay.py", *args])
    run_replay()


@pytest.mark.parametrize(
    ("rate", "broke", "module"),
    [
        ("1e4", "loss_mask", "roi_heads.mask_head."),
        ("1e30", "forward pass", "backbone."),  # detectron2's RPN: boxes not finite
    ],
)
def test_a_diverged_training_is_repeated(
    rate: str,
    broke: str,
    module: str,
    toy_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides = [*toy_overrides, f"optimizer.lr={rate}", "lr_multiplier.warmup_length=0.0"]
    overrides += ["train.max_iter=9", "train.amp.enabled=False"]
    cfg = get_config(CONFIG, overrides)
    setup_datasets(cfg)
    with pytest.raises(NonFiniteLossError):
        do_train(cfg)
    assert "loss or gradient not finite at iteration" in caplog.text
    assert "Traceback" not in caplog.text
    (file,) = (tmp_path / "out" / "nonfinite").iterdir()

    replay(monkeypatch, str(file), "--config-file", CONFIG, *overrides)
    printed = capsys.readouterr().out
    assert "/toy/train/0000" in printed
    (loss,) = [line.split() for line in printed.splitlines() if line.startswith(broke)]
    assert loss[-2:] == ["nan", "nan"]
    assert f"The first module whose output is not finite: {module}" in printed
    assert "Weights that were not finite before" not in printed


def test_another_model_and_another_file_are_refused(
    toy_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file.pth"
    for content, message in (
        ({"model": {}}, "file.pth is not a file"),
        (
            {"model": {}, "batch": [], "random": {}, "iteration": 1, "lr": 0.1},
            "weights do not fit this config's model",
        ),
    ):
        torch.save(content, file)
        with pytest.raises(SystemExit, match="2"):
            replay(monkeypatch, str(file), "--config-file", CONFIG, *toy_overrides)
        assert message in capsys.readouterr().err
