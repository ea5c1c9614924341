"""One step of a training: detectron2's trainers, in the precision that a config asks for."""

from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError


class BFloat16Trainer(SimpleTrainer):
    """Mixed precision in bfloat16, on CUDA or a CPU. Its range is float32's: no loss scaling."""

    def __init__(self, device: str, *args: Any) -> None:
        super().__init__(*args)
        self._device_type = torch.device(device).type

    def run_step(self) -> None:
        with torch.autocast(self._device_type, torch.bfloat16):
            super().run_step()


def check_precision(cfg: DictConfig) -> None:
    """
    Raises:
        ConfigError: if `train.amp` asks for what `train.device` cannot do.
    """
    dtype, device = cfg.train.amp.dtype, cfg.train.device
    if cfg.train.amp.enabled and dtype != "bf16" and (dtype != "fp16" or device == "cpu"):
        raise ConfigError(
            f"train.amp.dtype is {dtype!r} on device {device!r}, must be 'bf16', or 'fp16' on CUDA"
        )


def build_trainer(cfg: DictConfig, *args: Any) -> SimpleTrainer:
    """The trainer for `train.amp`.

    Args:
        cfg: `train.amp.enabled`, `train.amp.dtype` ("bf16", or "fp16" on CUDA) and `train.device`
            are read.
        args: model, data loader, optimizer.

    Raises:
        ConfigError: see `check_precision`.
    """
    check_precision(cfg)
    if not cfg.train.amp.enabled:
        return SimpleTrainer(*args)
    if cfg.train.amp.dtype == "bf16":
        return BFloat16Trainer(cfg.train.device, *args)
    return AMPTrainer(*args)
