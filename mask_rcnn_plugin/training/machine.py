"""What a run takes from its machine: device, layout of weights, half precision, fused optimizer.

A config says what is wanted, the same on every machine; nothing of it is changed here.
"""

from typing import Any

import torch
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.config.check import walk
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.errors import ConfigError


def memory_format(cfg: DictConfig) -> torch.memory_format:
    """Layout of the model's weights, by `train.channels_last`; "auto" is channels-last on a CPU."""
    wanted = cfg.train.channels_last
    if wanted == "auto":
        wanted = device_of(cfg).type == "cpu"
    return torch.channels_last if wanted else torch.contiguous_format


def precision(cfg: DictConfig) -> torch.dtype | None:
    """Type to autocast to, by `train.amp`; None to compute in float32.

    Asks the GPU, so the process's own must be the current one already.

    "auto" is bfloat16 where the device computes in it, else float32: emulated, bfloat16 is slower.

    Raises:
        ConfigError: for float16 on a CPU, or bfloat16 on a GPU that lacks it or with a norm that
            several processes share and that is not exact in it.
    """
    amp, device = cfg.train.amp, device_of(cfg)
    if not amp.enabled:
        return None
    if amp.dtype == "auto" and not _computes_in_bfloat16(device):
        return None
    if amp.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("train.amp.dtype is 'fp16' on device 'cpu', must be 'bf16' or 'auto'")
    if amp.dtype == "bf16" and device.type == "cuda" and not _computes_in_bfloat16(device):
        raise ConfigError(
            f"train.amp.dtype is 'bf16', which the GPU ({torch.cuda.get_device_name(device)}) "
            "lacks: give 'fp16' or 'auto'"
        )
    if amp.dtype == "fp16":
        return torch.float16
    # detectron2's naiveSyncBN computes a variance as a difference of squares, in the given type.
    if comm.get_world_size() > 1:
        for key, value in walk(OmegaConf.to_container(cfg.model, resolve=False), "model"):
            if isinstance(value, str) and value.startswith("naiveSyncBN"):
                raise ConfigError(
                    f"{key} is {value!r}, whose statistics are wrong in bfloat16 on several "
                    "processes: give train.amp.dtype=fp16"
                )
    return torch.bfloat16


def optimizer_node(cfg: DictConfig) -> dict[str, Any]:
    """`cfg.optimizer` to instantiate: where its `fused` is null, True on CUDA."""
    node = dict(cfg.optimizer.items())
    if "fused" in node and node["fused"] is None and device_of(cfg).type == "cuda":
        node["fused"] = True
    return node


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # as torch.cuda.is_bf16_supported, but of a device that is not in use
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8
    cpu: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
