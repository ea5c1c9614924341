from typing import Any

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import Tensor, nn

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.engine.train_loop import BFloat16Trainer, build_trainer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        self.seen.append(y.dtype)
        return {"loss": y.float().square().mean()}


def trainer(device: str = "cpu", **amp: Any) -> SimpleTrainer:
    model = Model()
    cfg = OmegaConf.create({"train": {"amp": amp, "device": device}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return build_trainer(cfg, model, [torch.ones(1, 2)] * 2, optimizer)


def test_float32_without_amp() -> None:
    built = trainer(enabled=False, dtype="bf16")
    assert type(built) is SimpleTrainer


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    built = trainer(enabled=True, dtype="bf16")
    assert isinstance(built, BFloat16Trainer)
    before = built.model.layer.weight.clone()
    with EventStorage() as built.storage:
        built.iter = 0
        built.run_step()
    assert built.model.seen == [torch.bfloat16]
    assert built.model.layer.weight.dtype == torch.float32
    assert not torch.equal(built.model.layer.weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: detectron2's fp16 needs one")
def test_fp16_is_detectron2s() -> None:
    assert isinstance(trainer("cuda", enabled=True, dtype="fp16"), AMPTrainer)


@pytest.mark.parametrize("dtype", ["fp16", "float8"])
def test_what_cannot_be_done_is_refused(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"train.amp.dtype is '{dtype}' on device 'cpu'"):
        trainer(enabled=True, dtype=dtype)
