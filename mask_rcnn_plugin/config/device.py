"""The device that a config asks for."""

import torch
from omegaconf import DictConfig

from mask_rcnn_plugin.errors import ConfigError


def device_of(cfg: DictConfig) -> torch.device:
    """The device to run on: `train.device`, or the CPU for "cuda" where torch finds no GPU.

    Raises:
        ConfigError: if `train.device` names a GPU that the machine lacks.
    """
    device, gpus = torch.device(cfg.train.device), torch.cuda.device_count()
    if device.type == "cuda" and device.index is None and not gpus:
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f"train.device is {cfg.train.device!r}, but torch finds {gpus} GPUs on this machine; "
            "train.device=cpu runs on the CPU"
        )
    return device
