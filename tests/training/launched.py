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

from mask_rcnn_plugin.training import setup_datasets  # isort: split

from detectron2.engine import HookBase, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training.launch import launch, log_processes, parse_launch_args

sys.path.append(str(Path(__file__).resolve().parents[2]))  # of train.py
from train import do_train


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


def mistake_of_rank_0(args: argparse.Namespace, cfg: DictConfig) -> None:
    if comm.is_main_process():
        raise UserError("rank 0 cannot go on")
    comm.synchronize()


def end_with_the_start_method(args: argparse.Namespace, cfg: DictConfig) -> None:
    """As an exit code: of the processes that load images."""
    sys.exit(10 + multiprocessing.get_all_start_methods().index(multiprocessing.get_start_method()))


def end_with_75_at_sigterm(args: argparse.Namespace, cfg: DictConfig) -> None:
    """The first rank sends it to the parent, which passes it on."""

    def end(*_: object) -> None:
        raise SystemExit(75)

    signal.signal(signal.SIGTERM, end)
    comm.synchronize()
    if comm.is_main_process():
        os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()


def end_with_75_and_be_signalled_again(args: argparse.Namespace, cfg: DictConfig) -> None:
    Finalize(None, os.kill, (os.getpid(), signal.SIGTERM), exitpriority=0)  # as the process ends
    raise SystemExit(75)


if __name__ == "__main__":
    launch(parse_launch_args(argparse.ArgumentParser()), prepare, run)
