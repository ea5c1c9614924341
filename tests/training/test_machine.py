"""What a run takes from its machine, and that a config takes nothing from it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from omegaconf import DictConfig

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import deciding, flatten
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.errors import ConfigError
from mask_rcnn_plugin.training.machine import memory_format, optimizer_node, precision

ROW = "table2a_backbone/r50_fpn"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a machine with so many GPUs, and with bfloat16 or without."""

    def make(gpus: int, bfloat16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        capability = (8, 0) if bfloat16 else (6, 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GTX 1080")
        cpu = {"avx512_bf16": bfloat16, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)

    return make


@pytest.mark.parametrize("config", [ROW, f"{ROW}+synthetic"])
def test_a_config_and_what_decides_are_the_same_on_every_machine(
    config: str, machine: Callable[..., None]
) -> None:
    found = []
    for gpus, bfloat16 in ((0, False), (0, True), (8, False), (8, True)):
        machine(gpus, bfloat16)
        cfg = get_config(config)
        assert cfg.train.device == "cuda"
        assert device_of(cfg).type == ("cuda" if gpus else "cpu")
        found.append((flatten(cfg, resolve=True), deciding(cfg)))
    assert all(each == found[0] for each in found)


def test_a_config_is_the_same_in_processes_with_and_without_gpus(
    run_python: Callable[..., Any],
) -> None:
    code = (
        "import json, sys, torch\n"
        "torch.cuda.is_available = lambda: bool(int(sys.argv[2]))\n"
        "from mask_rcnn_plugin.config import flatten, get_config\n"
        "print(json.dumps(flatten(get_config(sys.argv[1]), resolve=True), sort_keys=True))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first, second = (run_python("-c", code, f"{ROW}+synthetic", gpu, env=env) for gpu in "01")
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        *((0, "cuda", "cpu"), (0, "cpu", "cpu"), (1, "cpu", "cpu")),
        *((1, "cuda", "cuda"), (2, "cuda:1", "cuda:1")),
    ],
)
def test_without_a_gpu_it_is_the_cpu_and_the_config_stays(
    gpus: int, asked: str, expected: str, machine: Callable[..., None]
) -> None:
    machine(gpus, True)
    cfg = get_config(ROW, [f"train.device={asked}"])
    assert device_of(cfg) == torch.device(expected)
    assert cfg.train.device == asked


@pytest.mark.parametrize(("gpus", "device"), [(0, "cuda:0"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_an_error(
    gpus: int, device: str, machine: Callable[..., None]
) -> None:
    machine(gpus, True)
    with pytest.raises(ConfigError, match=f"train.device is '{device}', .* {gpus} GPUs"):
        device_of(get_config(ROW, [f"train.device={device}"]))


def train(
    device: str, dtype: str, channels_last: str = "auto", enabled: str = "true"
) -> DictConfig:
    overrides = [f"train.device={device}", f"train.amp.dtype={dtype}"]
    overrides += [f"train.amp.enabled={enabled}", f"train.channels_last={channels_last}"]
    return get_config(ROW, overrides)


@pytest.mark.parametrize(
    ("device", "dtype", "bfloat16", "expected"),
    [
        ("cpu", "auto", True, torch.bfloat16),
        ("cpu", "auto", False, None),
        ("cpu", "bf16", False, torch.bfloat16),  # emulated, as asked for
        ("cuda", "fp16", False, torch.float16),
    ],
)
def test_precision(
    device: str,
    dtype: str,
    bfloat16: bool,
    expected: torch.dtype | None,
    machine: Callable[..., None],
) -> None:
    machine(1, bfloat16)
    assert precision(train(device, dtype)) == expected
    assert precision(train(device, dtype, enabled="false")) is None


@pytest.mark.parametrize(("bfloat16", "auto"), [(True, torch.bfloat16), (False, None)])
def test_precision_on_a_gpu(
    bfloat16: bool,
    auto: torch.dtype | None,
    machine: Callable[..., None],
) -> None:
    machine(1, bfloat16)
    assert precision(train("cuda", "auto")) == auto
    if bfloat16:
        assert precision(train("cuda", "bf16")) == torch.bfloat16
        return
    with pytest.raises(ConfigError, match="'bf16'.*GTX 1080"):
        precision(train("cuda", "bf16"))


def test_a_norm_that_bfloat16_breaks_is_refused_where_processes_share_it(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, True)
    cfg = get_config("table2a_backbone/r50_fpn+lsj_100ep", ["train.amp.dtype=bf16"])
    assert precision(cfg) == torch.bfloat16
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="conv_norm is 'naiveSyncBN_N'.*fp16"):
        precision(cfg)
    assert precision(get_config("table2a_backbone/r50_fpn+lsj_100ep")) == torch.float16


def test_half_precision_that_a_cpu_lacks_is_an_error(machine: Callable[..., None]) -> None:
    machine(0, True)
    with pytest.raises(ConfigError, match="'fp16' on device 'cpu'"):
        precision(train("cpu", "fp16"))


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [
        ("cpu", "auto", torch.channels_last),
        ("cuda", "auto", torch.contiguous_format),
        ("cpu", "false", torch.contiguous_format),
        ("cuda:0", "true", torch.channels_last),
    ],
)
def test_layout(
    device: str, wanted: str, expected: torch.memory_format, machine: Callable[..., None]
) -> None:
    machine(1, True)
    assert memory_format(train(device, "bf16", wanted)) == expected


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [
        *(("cpu", "null", None), ("cuda:0", "null", True)),
        *(("cuda", "false", False), ("cpu", "true", True)),
    ],
)
def test_the_optimizer_is_fused_where_the_device_is_cuda(
    device: str, wanted: str, expected: bool | None, machine: Callable[..., None]
) -> None:
    machine(1, True)
    cfg = get_config(ROW, [f"train.device={device}", f"optimizer.fused={wanted}"])
    cfg.optimizer.params.model = torch.nn.Linear(1, 1)
    assert optimizer_node(cfg)["fused"] == expected
    assert isinstance(instantiate(optimizer_node(cfg)), torch.optim.SGD)
    del cfg.optimizer.fused  # as an optimizer of a user's own may have none
    assert "fused" not in optimizer_node(cfg)
