"""A training as `do_train` runs it, small and quick."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from omegaconf import DictConfig

import train
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training import setup_datasets

# Narrow: a step takes 0.2 s.
CONFIG = "table2a_backbone/r50_c4+synthetic"
NARROW = ("model.backbone.width=8", "train.seed=-1", "dataloader.train.seed=5")


@pytest.fixture
def build(toy_overrides: list[str], tmp_path: Path) -> Any:
    def build(folder: str, *overrides: str) -> DictConfig:
        output = f"train.output_dir={tmp_path / folder}"
        cfg = get_config(CONFIG, [*toy_overrides, *NARROW, output, *overrides])
        Path(cfg.train.output_dir).mkdir(exist_ok=True)
        setup_datasets(cfg)
        torch.manual_seed(0)
        np.random.seed(0)
        return cfg

    return build


class Interrupt(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt() -> type[HookBase]:
    """A hook that ends a training after an iteration and its evaluation."""
    return Interrupt


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluations that draw random numbers and give these scores, one after the other."""

    def given(*scores: float) -> list[float]:
        left = list(scores)

        def evaluate(cfg: DictConfig, model: Any) -> dict[str, Any]:
            torch.rand(3), np.random.rand(3)
            return {"segm": {"AP": left.pop(0)}}

        monkeypatch.setattr(train, "do_test", evaluate)
        return left

    return given
