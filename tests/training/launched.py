"""A program that test_launch.py starts in several processes, in each of the ways."""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mask_rcnn_plugin.training import setup_datasets  # isort: split

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.config import get_config
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training import launch
from mask_rcnn_plugin.training.launch import (
    Prepare,
    Run,
    log_processes,
    parse_program_args,
    run_program,
)
from mask_rcnn_plugin.training.placement import Placement
from mask_rcnn_plugin.training.preemption import Preemption

CONFIG = "table4_keypoints/keypoint_and_mask+synthetic"

sys.path.append(str(Path(__file__).resolve().parents[2]))  # of train.py
from train import do_train  # noqa: E402


class WriteDigests(HookBase):
    """Writes ranks.json: of each rank [rank, local rank, machine, digest of its weights]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after_train(self) -> None:
        digest = hashlib.sha256()
        for tensor in self.trainer.model.module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        machine = comm.get_rank() // comm.get_local_size()
        ranks = comm.all_gather([comm.get_local_rank(), machine, digest.hexdigest()])
        if comm.is_main_process():
            (self._folder / "ranks.json").write_text(json.dumps(ranks))


def prepare(args: argparse.Namespace, cfg: DictConfig) -> None:
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if "LOSE_RANK_1" in os.environ and first_start and comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    setup_datasets(cfg)


def run(args: argparse.Namespace, cfg: DictConfig) -> None:
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mask_rcnn_plugin")
    log_processes(cfg)
    do_train(cfg, extra_hooks=[WriteDigests(Path(cfg.train.output_dir))])


def prepare_nothing(args: argparse.Namespace, cfg: DictConfig) -> None:
    pass


def end_with_the_start_method(args: argparse.Namespace, cfg: DictConfig) -> None:
    """As an exit code: of the processes that load images."""
    sys.exit(10 + multiprocessing.get_all_start_methods().index(multiprocessing.get_start_method()))


def end_with_75_at_sigterm(args: argparse.Namespace, cfg: DictConfig) -> None:
    """The first rank sends it to the parent, which passes it on; and another one, as it ends."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(75)

    Finalize(None, os.kill, (os.getpid(), signal.SIGTERM), exitpriority=0)  # as the process ends
    signal.signal(signal.SIGTERM, end)
    comm.synchronize()
    if comm.is_main_process():
        os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()


def mistake_of_rank_0(args: argparse.Namespace, cfg: DictConfig) -> None:
    if comm.is_main_process():
        raise UserError("rank 0 cannot go on")
    comm.synchronize()


def mistake_of_rank_1(args: argparse.Namespace, cfg: DictConfig) -> None:
    if comm.get_rank() == 1:
        raise UserError("rank 1 cannot go on")
    comm.all_gather("rank 0 waits")


def late_mistake_of_rank_1(args: argparse.Namespace, cfg: DictConfig) -> None:
    comm.synchronize()
    if comm.get_rank() == 1:
        raise UserError("rank 1 cannot go on")


def mistake_of_all(args: argparse.Namespace, cfg: DictConfig) -> None:
    raise UserError("nobody can go on")


def must_not_run(args: argparse.Namespace, cfg: DictConfig) -> None:
    print("run was called", file=sys.stderr)


def exchange_without_rank_1(args: argparse.Namespace, cfg: DictConfig) -> None:
    if comm.get_rank() == 1:
        signal.pause()
    comm.all_gather("for how long?")


def synchronize_without_rank_1(args: argparse.Namespace, cfg: DictConfig) -> None:
    if comm.get_rank() == 1:
        signal.pause()
    comm.synchronize()


def mistake_that_rank_0_does_not_see(args: argparse.Namespace, cfg: DictConfig) -> None:
    """As where it waits within an operation on its GPU."""
    if comm.is_main_process():
        signal.pause()
    raise UserError("rank 1 cannot go on")


def evaluate_until_a_signal(args: argparse.Namespace, cfg: DictConfig) -> None:
    """The first rank computes, the second one has no more to do; a signal reaches both."""
    saving: Any = SimpleNamespace(error=None)
    preemption = Preemption(saving)
    preemption.trainer = SimpleNamespace()
    with preemption:
        comm.synchronize()
        with preemption.at_once():
            print("evaluating", file=sys.stderr, flush=True)
            if comm.is_main_process():
                signal.pause()
        comm.synchronize()  # as detectron2's EvalHook after an evaluation


def run_rank(
    rank: int, port: int, folder: str, overrides: list[str], prepare: Prepare, run: Run
) -> None:
    """One of two processes, that meet at the test's store; its standard error is a file.

    With train.device=cuda the machine has two GPUs, and gloo stands in for NCCL.
    """
    sys.argv = ["train.py"]
    sys.stderr = (Path(folder) / f"rank{rank}").open("w", buffering=1)
    get_config(CONFIG)  # its imports take long; before any time-out counts
    store = dist.TCPStore("127.0.0.1", port)
    store.set(f"started/{rank}", "")
    store.wait([f"started/{other}" for other in range(2)])
    original = dist.init_process_group

    def init_process_group(backend: str, **settings: Any) -> None:
        original(backend.replace("nccl", "gloo"), **settings)

    def destroy_process_group() -> None:
        """As NCCL's, which returns where all ranks have called it."""
        store.set(f"ending/{rank}", "")
        store.wait([f"ending/{other}" for other in range(2)])

    dist.init_process_group = init_process_group
    if "train.device=cuda" in overrides:
        dist.destroy_process_group = destroy_process_group
        launch._END_SECONDS = 1
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = lambda device: print("GPU", device, file=sys.stderr)
    args = argparse.Namespace(config=CONFIG, overrides=overrides, num_gpus=None)
    launch._run(Placement(rank, 2, rank, 2, ""), lambda timeout: store, args, prepare, run)


if __name__ == "__main__":
    run_program(parse_program_args(argparse.ArgumentParser()), prepare, run)
