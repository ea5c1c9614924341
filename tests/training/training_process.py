"""What processes of the tests run: a training, that ends itself at a moment if it is told to."""

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase

import mask_rcnn_plugin  # isort: split  # noqa: F401  before anything of detectron2's
import train
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training import checkpoint, setup_datasets
from mask_rcnn_plugin.training.launch import destroy_process_group
from train import do_train

CONFIG = "table2a_backbone/r50_c4+synthetic"
NARROW = (
    *("model.backbone.width=8", "train.seed=-1", "dataloader.train.seed=5"),
    *("train.checkpointer.period=1", "train.checkpointer.max_to_keep=2"),
)


class Progress(HookBase):
    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def before_step(self) -> None:
        self.pipe.send(("step", self.trainer.iter))


def run(pipe: Connection, overrides: list[str], save: int = 0, call: int = 0) -> None:
    """Train, or go on.

    Args:
        pipe: gets ("step", iteration) before each and ("calls", number) after each checkpoint: how
            many functions were called to save it.
        overrides: of the config.
        save, call: in its n-th checkpoint, before the n-th function call, the process kills itself.
    """
    silence()
    saved = 0
    original = checkpoint.SafeCheckpointer.save

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal saved
        saved += 1
        calls = 0

        def count(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")
            if saved == save and calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            original(self, *args, **kwargs)
        finally:
            sys.setprofile(None)
        pipe.send(("calls", calls))

    checkpoint.SafeCheckpointer.save = counted  # type: ignore[method-assign]
    train.do_test = lambda cfg, model: {}  # type: ignore[assignment]
    go_on(overrides, Progress(pipe))


def run_rank(pipe: Connection, rank: int, overrides: list[str], store: str) -> None:
    """Train as one of two processes; its exit code is the process's."""
    silence()
    code: Any = 0
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        go_on(overrides, Progress(pipe))
    except SystemExit as end:
        code = end.code
    destroy_process_group()
    sys.exit(code)


def go_on(overrides: list[str], hook: HookBase) -> None:
    cfg = get_config(CONFIG, [*overrides, *NARROW])
    Path(cfg.train.output_dir).mkdir(exist_ok=True)
    setup_datasets(cfg)
    torch.manual_seed(0)
    np.random.seed(0)
    do_train(cfg, resume=True, extra_hooks=[hook])


def silence() -> None:
    """Nothing on standard output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
