"""One entry point for the programs that run a config: alone, spawned, under torchrun, under srun.

Each process of a run goes through `launch` alike. They meet at torch's key-value store first, so
that a mistake that only one of them finds ends all, and is told once.
"""

import argparse
import gc
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from datetime import timedelta
from functools import partial
from io import StringIO
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.distributed.rendezvous import rendezvous

from mask_rcnn_plugin.config import ConfigError, get_config
from mask_rcnn_plugin.config.printing import add_print_arguments, print_config
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training.machine import fit_to_machine
from mask_rcnn_plugin.training.placement import ALONE, Placement, placement_from
from mask_rcnn_plugin.training.preemption import EXIT_CODE, SIGNALS

T = TypeVar("T")
Prepare = Callable[[argparse.Namespace, DictConfig], None]
Run = Callable[[argparse.Namespace, DictConfig], None]

# What spawned processes have to end, once one of them has; a checkpoint may be half written.
_GRACE_SECONDS = 60
# How long a rank that has found a mistake waits for the others to end together.
_PATIENCE_SECONDS = 10

logger = logging.getLogger(__name__)


def parse_launch_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and the variables of torchrun and srun.

    Returns:
        The parser's own arguments, and what `launch` reads: `config`, `num_gpus`, `overrides`,
        `placement`.

    Raises:
        SystemExit: with exit code 2 and one line on standard error, if something is wrong; with 0
            if the config was only to be printed. Of several processes the first one writes.
    """
    parser.add_argument(
        "--config-file",
        dest="config",
        required=True,
        metavar="CFG",
        help="short name or path of a config, with overlays behind a plus: NAME+synthetic",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes to start on this machine, each with a GPU (1); not with torchrun or srun, "
        "which start them",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    add_print_arguments(parser)
    try:
        placement = placement_from(os.environ)
    except ConfigError as error:
        parser.error(str(error))
    with redirect_stderr(StringIO()) if placement and placement.rank else nullcontext():
        args = parser.parse_intermixed_args()
        if args.num_gpus is not None and args.num_gpus < 1:
            parser.error(f"--num-gpus is {args.num_gpus}, must be 1 or more")
        if args.num_gpus is not None and placement:
            parser.error(
                f"--num-gpus is {args.num_gpus}, but this is one of {placement.world_size} "
                "processes that torchrun or srun has started: leave it out"
            )
        try:
            if print_config(args):
                parser.exit()
        except UserError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
    args.placement = placement
    return args


def launch(args: argparse.Namespace, prepare: Prepare, run: Run) -> None:
    """Load the config and run it: in this process or, with `--num-gpus`, in several.

    Processes talk over NCCL if `train.device` is CUDA, over gloo if not. Each has its own GPU.

    Args:
        args: from `parse_launch_args`.
        prepare: checks and completes the config, in place, as far as possible without building or
            writing anything; each process calls it.
        run: what each process does, after all have prepared.

    Raises:
        SystemExit: with exit code 2 for a `UserError`, which one process prints as one line,
            whichever of them it comes from; what `run` raises, as it is.
    """
    if args.placement:
        store = _meet(args)
        # torchrun's store outlives a group that it starts again, perhaps in another size.
        group = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{args.placement.world_size}"
        _run(args.placement, dist.PrefixStore(group, store), args, prepare, run)
        return
    if args.num_gpus in (None, 1):
        _run(ALONE, dist.HashStore(), args, prepare, run)
        return
    try:
        _load(args, args.num_gpus, args.num_gpus)  # now, not in so many processes
    except UserError as error:
        _print(error)
        sys.exit(2)
    _spawn(args, prepare, run)


def _meet(args: argparse.Namespace) -> dist.Store:
    """The store at which the processes of torchrun or srun meet; they wait for the others there."""
    rank, world_size, *_, url = args.placement
    try:
        minutes = get_config(args.config, args.overrides).train.process_group_timeout
    except ConfigError:  # told when all have come
        minutes = 5.0
    try:
        store, *_ = next(rendezvous(url, rank, world_size, timeout=timedelta(minutes=minutes)))
    except RuntimeError as error:
        _print(
            UserError(
                f"rank {rank} of {world_size} processes has not met the others at {url} within "
                f"train.process_group_timeout, {minutes:g} minutes: {str(error).splitlines()[0]}"
            )
        )
        sys.exit(2)
    return store


def log_processes(cfg: DictConfig) -> None:
    """Log which processes run this and how they talk. All must call it; the main one's is shown."""
    ranks = enumerate(comm.all_gather(socket.gethostname()))
    hosts = []
    for host, group in groupby(ranks, key=lambda rank_and_host: rank_and_host[1]):
        numbers = [rank for rank, _ in group]
        hosts.append(f"{numbers[0]} to {numbers[-1]} on {host}")
    if comm.get_world_size() == 1:
        logger.info("1 process, on %s, device %s", socket.gethostname(), cfg.train.device)
        return
    logger.info(
        "%d processes over %s, time-out %g minutes (train.process_group_timeout), device %s: "
        "ranks %s; this is rank %d, local rank %d",
        comm.get_world_size(),
        dist.get_backend(),
        cfg.train.process_group_timeout,
        cfg.train.device,
        ", ".join(hosts),
        comm.get_rank(),
        comm.get_local_rank(),
    )


def _spawn(args: argparse.Namespace, prepare: Prepare, run: Run) -> None:
    """Run in processes of this machine; their highest exit code becomes this one's."""
    # Here, so that it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(args.num_gpus):
        placement = Placement(rank, args.num_gpus, rank, args.num_gpus, "")
        given = (multiprocessing.get_start_method(), placement, store.port, args, prepare, run)
        processes.append(context.Process(target=_spawned, args=given))
        processes[-1].start()

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    alive = list(processes)
    while alive and not any(process.exitcode for process in processes):
        # Not of those alive now: with none left it would wait for ever.
        wait([process.sentinel for process in alive])
        alive = [process for process in processes if process.exitcode is None]
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
        elif process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            print(f"rank {rank} was ended by {name}", file=sys.stderr)
    codes = [process.exitcode or 0 for process in processes]
    if any(codes):
        sys.exit(max(*codes, 1))


def _spawned(
    start_method: str,
    placement: Placement,
    port: int,
    args: argparse.Namespace,
    prepare: Prepare,
    run: Run,
) -> None:
    # As under torchrun. Workers that are spawned too take long to start, and copy the data set.
    multiprocessing.set_start_method(start_method, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run(placement, dist.TCPStore("127.0.0.1", port), args, prepare, run)


def _end_with_parent() -> None:
    """Else a rank whose parent is killed would go on, and keep its GPU."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _run(
    placement: Placement, store: dist.Store, args: argparse.Namespace, prepare: Prepare, run: Run
) -> None:
    """What each process goes through."""
    code: Any = None
    try:
        load = partial(_load, args, placement.world_size, placement.local_size)
        cfg = _on_all_ranks(store, placement, "load", load)
        if placement.world_size > 1:
            _create_process_group(store, placement, cfg)
        _on_all_ranks(store, placement, "prepare", partial(prepare, args, cfg))
        run(args, cfg)
        if placement.world_size > 1:
            comm.synchronize()  # the store may be the first rank's, which must not go first
    except SystemExit as end:  # at a signal, or because another rank has told a mistake
        code = end.code
        if code == EXIT_CODE:
            # Signals may come twice, to each process and passed on; the code is to come back.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    except UserError as error:
        _tell(store, error)
        sys.exit(2)
    except Exception as error:
        _end_if_another_has(store)
        if dist.is_initialized() and re.search("timed? ?out", str(error).lower()):
            raise RuntimeError(
                "a rank waited for the others longer than train.process_group_timeout, "
                f"{cfg.train.process_group_timeout:g} minutes: look for one that has stopped, or "
                "give it more"
            ) from error
        raise
    # Not in the clauses above, where the exception still holds all of the training.
    if dist.is_initialized():
        destroy_process_group()
    if code:
        sys.exit(code)


def destroy_process_group() -> None:
    """End the process group and its threads.

    Threads that live on while the interpreter goes may abort it, and with it the exit code.
    """
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()
    dist.destroy_process_group()


def _on_all_ranks(store: dist.Store, placement: Placement, name: str, step: Callable[[], T]) -> T:
    """Do a step on every rank; a mistake on one of them ends them all."""
    all_done = f"{name}: all"
    deadline = 0.0
    try:
        result = step()
    except UserError as error:
        _tell(store, error)
        # Another rank may wait for this one within the step; its end will be noticed there.
        deadline = time.monotonic() + _PATIENCE_SECONDS
    if store.add(name, 1) == placement.world_size:
        store.set(all_done, "")
    if deadline:
        while not store.check([all_done]) and time.monotonic() < deadline:
            time.sleep(0.1)
        store.set(all_done, "")
    store.wait([all_done])
    _end_if_another_has(store)
    return result


def _tell(store: dist.Store, error: UserError) -> None:
    """Print a mistake, unless another rank has printed its own."""
    if store.add("mistakes", 1) == 1:
        _print(error)


def _print(error: UserError) -> None:
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)


def _end_if_another_has(store: dist.Store) -> None:
    """End in silence if a rank has told a mistake: whatever goes wrong here comes from that."""
    try:
        mistakes = store.add("mistakes", 0)
    except RuntimeError:  # under srun the first rank's: it has ended, and has said why
        sys.exit(1)
    if mistakes:
        sys.exit(2)


def _load(args: argparse.Namespace, world_size: int, local_size: int) -> DictConfig:
    """
    Raises:
        ConfigError: for a mistake in the config, or if it cannot run in so many processes.
    """
    cfg = get_config(args.config, args.overrides)
    fit_to_machine(cfg, warn=not (args.placement and args.placement.rank))
    device = cfg.train.device
    if (args.num_gpus or 1) > 1 and device == "cpu" and "train.device=cpu" not in args.overrides:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but torch finds no GPU here: train.device=cpu runs "
            "as many processes on the CPU"
        )
    if world_size > 1 and device not in ("cuda", "cpu"):
        raise ConfigError(
            f"train.device is {device!r}, must be 'cuda', for each process its own GPU, or 'cpu' "
            f"for {world_size} processes"
        )
    visible = torch.cuda.device_count()
    own = visible == 1 and not args.num_gpus  # srun may show each task a GPU of its own
    if device.startswith("cuda") and local_size > visible and not own:
        raise ConfigError(
            f"{local_size} processes on this machine (--num-gpus, or as torchrun or srun starts "
            f"them), but it has {visible} visible GPUs: give at most that many, or train.device=cpu"
        )
    return cfg


def _create_process_group(store: dist.Store, placement: Placement, cfg: DictConfig) -> None:
    """
    Raises:
        ConfigError: if the ranks of a machine are not consecutive, or as many as on each other one.
    """
    rank, world_size, local_rank, local_size, _ = placement
    timeout = timedelta(minutes=cfg.train.process_group_timeout)
    cuda = cfg.train.device == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    places = comm.all_gather((local_rank, local_size))
    equal = places == [(r % local_size, local_size) for r in range(world_size)]
    if not equal or world_size % local_size:
        raise ConfigError(
            f"(local rank, local size) of the ranks are {places}: each machine must run the same "
            "number of processes, ranks in order (srun --distribution=block)"
        )
    # What detectron2's launch sets up: who shares a machine.
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(local_size, timeout=timeout)
