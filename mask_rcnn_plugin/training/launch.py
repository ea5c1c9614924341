"""One entry point for the programs that run a config: alone, `--num-gpus`, torchrun or srun."""

import argparse
import gc
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import lru_cache, partial
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from mask_rcnn_plugin.config import ConfigError, get_config
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.config.printing import print_config
from mask_rcnn_plugin.errors import UserError, mistakes_in_one_line, print_mistake
from mask_rcnn_plugin.training.machine import precision
from mask_rcnn_plugin.training.placement import ALONE, Placement, placement_from
from mask_rcnn_plugin.training.preemption import EXIT_CODE, SIGNALS

Prepare = Callable[[argparse.Namespace, DictConfig], None]
Run = Callable[[argparse.Namespace, DictConfig], None]
Meet = Callable[..., dist.Store]  # by timeout=

# How long the other processes have to end after one has failed, before they get SIGTERM; then as
# long again before SIGKILL.
_GRACE_SECONDS = 30
# Within this time ranks that all have a mistake come to their end.
_END_SECONDS = 10

logger = logging.getLogger(__name__)


def parse_program_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and the variables of torchrun and srun, for `run_program`.

    Raises:
        SystemExit: with exit code 2 and one line on standard error, if something is wrong; with 0
            if the config was only to be printed. Of several processes the first one writes.
    """
    parser.add_argument(
        "--config-file",
        dest="config",
        required=True,
        metavar="CFG",
        help="name, file or output folder of a config; overlays follow a plus: NAME+synthetic",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes to start here, one per GPU (default: 1); not with torchrun or srun",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the config as YAML, with overlays and overrides applied, and exit",
    )
    parser.add_argument(
        "--diff", metavar="BASE", help="print how the config differs from the config BASE, and exit"
    )
    try:
        placement = placement_from(os.environ)
    except ConfigError as error:
        parser.error(str(error))
    with ExitStack() as silence:
        if placement and placement.rank:
            silence.enter_context(redirect_stdout(StringIO()))
            silence.enter_context(redirect_stderr(StringIO()))
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


def run_program(args: argparse.Namespace, prepare: Prepare, run: Run) -> None:
    """Load the config and run it: in this process or, with `--num-gpus`, in several.

    Args:
        args: from `parse_program_args`.
        prepare: checks and completes the config, in place, as far as possible without building or
            writing anything; each process calls it.
        run: what each process does, after all have prepared.

    Raises:
        SystemExit: with exit code 2 for a `UserError`, which one process prints as one line,
            whichever of them it comes from; what `run` raises, as it is.
    """
    if args.placement:
        _run(args.placement, partial(_rendezvous, args.placement), args, prepare, run)
    elif args.num_gpus in (None, 1):
        _run(ALONE, lambda timeout: dist.HashStore(), args, prepare, run)
    else:
        with mistakes_in_one_line():  # now, not in so many processes
            _load(args, Placement(0, args.num_gpus, 0, args.num_gpus, ""))
        _spawn(args, prepare, run)


def log_processes(cfg: DictConfig) -> None:
    """Log which processes run this and how they talk. All must call it; the main one's is shown."""
    device = device_of(cfg)
    if device.type == "cpu" and cfg.train.device != "cpu":
        logger.info("torch finds no GPU: running on the CPU")
    hosts = Counter(comm.all_gather(socket.gethostname()))
    where = ", ".join(f"{number} on {host}" for host, number in hosts.items())
    processes = "process" if comm.get_world_size() == 1 else "processes"
    line = f"{comm.get_world_size()} {processes} ({where}), device {device}"
    if dist.is_initialized():
        minutes = f"{cfg.train.process_group_timeout:g} minutes (train.process_group_timeout)"
        line += f", over {dist.get_backend()}, time-out {minutes}"
    logger.info(line)


def _spawn(args: argparse.Namespace, prepare: Prepare, run: Run) -> None:
    """Run in processes of this machine, and end with the exit code of the first that fails."""
    # Here, so that it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_method = multiprocessing.get_start_method()
    context = start_processes(
        _spawned,
        (start_method, store.port, args, prepare, run),
        nprocs=args.num_gpus,
        join=False,
        start_method="spawn",  # CUDA can't be used in a fork
    )

    def forward(number: int, _: object) -> None:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in SIGNALS:
        signal.signal(number, forward)
    try:
        while not context.join(grace_period=_GRACE_SECONDS):
            pass
    except ProcessExitedException as error:
        if error.exit_code < 0:
            print(f"rank {error.error_index} was killed by {error.signal_name}", file=sys.stderr)
        sys.exit(max(error.exit_code, 1))


def _spawned(
    rank: int, start_method: str, port: int, args: argparse.Namespace, prepare: Prepare, run: Run
) -> None:
    # As under torchrun. Workers that are spawned too take long to start, and copy the dataset.
    multiprocessing.set_start_method(start_method, force=True)
    placement = Placement(rank, args.num_gpus, rank, args.num_gpus, "")
    try:
        _run(placement, partial(dist.TCPStore, "127.0.0.1", port), args, prepare, run)
    except Exception:  # told at once, not when the parent has seen all end
        traceback.print_exc()
        sys.exit(1)


def _rendezvous(placement: Placement, timeout: timedelta) -> dist.Store:
    rank, world_size, *_, url = placement
    store, *_ = next(rendezvous(url, rank, world_size, timeout=timeout))
    # torchrun's store outlives a group that it starts again, perhaps in another size.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"{restart}/{world_size}", store)


def _run(
    placement: Placement, meet: Meet, args: argparse.Namespace, prepare: Prepare, run: Run
) -> None:
    """What each process goes through."""
    cfg, store = _load_together(placement, meet, args)
    code: Any = 0
    try:
        _set_device(placement, cfg)
        precision(cfg)  # refused now, if the device can't compute so
        if placement.world_size > 1:
            _create_process_group(placement, store, cfg)
        prepare(args, cfg)
        comm.synchronize()  # `run` writes: not before all have prepared
        run(args, cfg)
        comm.synchronize()  # the store may be the first rank's, which must not go first
    except SystemExit as end:
        code = end.code
        if code == EXIT_CODE:
            # Signals may come twice, to each process and passed on; the code is to come back.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    except UserError as error:
        code = 2
        if _count_mistakes(store, 1) == 1:
            print_mistake(error)
    except Exception as error:
        if not _count_mistakes(store, 0):
            if dist.is_initialized() and re.search("timed? ?out", str(error).lower()):
                raise RuntimeError(
                    "a rank waited for the others longer than train.process_group_timeout, "
                    f"{cfg.train.process_group_timeout:g} minutes"
                ) from error
            raise
        code = 2  # whatever goes wrong here comes from the mistake that another rank has told
    # Not in the clauses above, where the exception still holds all of the training.
    if dist.is_initialized():
        is_nccl = device_of(cfg).type == "cuda"
        if code and is_nccl and not _all_end(store, placement.world_size):
            # The end of NCCL would wait for the others, which wait for this one: the launcher
            # learns of it from the exit code, and ends them.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        destroy_process_group()
    if code:
        sys.exit(code)


def _load_together(
    placement: Placement, meet: Meet, args: argparse.Namespace
) -> tuple[DictConfig, dist.Store]:
    """Load the config in each process; a mistake in any of them ends all, and is told once."""
    mistake, minutes = "", 5.0
    try:
        cfg = _load(args, placement)
        minutes = cfg.train.process_group_timeout
    except UserError as error:
        mistake = str(error)
    rank, world_size, *_, url = placement
    try:
        store = meet(timeout=timedelta(minutes=minutes))
        store.set_timeout(timedelta(minutes=minutes))
        store.set(f"mistake/{rank}", mistake)
        mistakes = [store.get(f"mistake/{r}").decode() for r in range(world_size)]
        store.set(f"seen/{rank}", "")
        for other in range(world_size if rank == 0 else 0):  # the store may be this process's
            store.get(f"seen/{other}")
    except RuntimeError as error:
        print_mistake(
            f"rank {rank} of {world_size} processes did not reach the others at {url} within "
            f"train.process_group_timeout, {minutes:g} minutes: {str(error).splitlines()[0]}"
        )
        sys.exit(2)
    if any(mistakes):
        if rank == 0:
            print_mistake(next(filter(None, mistakes)))
        sys.exit(2)
    return cfg, store


def _load(args: argparse.Namespace, placement: Placement) -> DictConfig:
    """Refuse a mistake in the config, and one that cannot run in so many processes."""
    cfg = get_config(args.config, args.overrides)
    device, world_size, local_size = device_of(cfg), placement.world_size, placement.local_size
    if (args.num_gpus or 1) > 1 and device.type == "cpu" and cfg.train.device != "cpu":
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but torch finds no GPU here: train.device=cpu runs "
            "as many processes on the CPU"
        )
    if world_size > 1 and device.index is not None:
        raise ConfigError(
            f"train.device is {cfg.train.device!r}, must be 'cuda' or 'cpu' for {world_size} "
            "processes"
        )
    visible = torch.cuda.device_count()
    own = visible == 1 and placement.url.startswith("tcp:")  # srun may show each task its own GPU
    if device.type == "cuda" and local_size > visible and not own:
        raise ConfigError(
            f"{local_size} processes on this machine, but it has {visible} visible GPUs: start at "
            "most that many, or give train.device=cpu"
        )
    return cfg


def _set_device(placement: Placement, cfg: DictConfig) -> None:
    """Make the process's GPU the current one: torch's random state and streams are of that one."""
    device = device_of(cfg)
    if device.type == "cuda":
        own = placement.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(own if device.index is None else device.index)


def _create_process_group(placement: Placement, store: dist.Store, cfg: DictConfig) -> None:
    """Create the group of all processes, over NCCL with gloo beside it, or over gloo alone.

    detectron2's exchange of objects and its `synchronize` go over gloo: there a process that waits
    learns that another one has ended. In NCCL it waits on.

    Raises:
        ConfigError: if the ranks of a machine aren't consecutive, or machines run different numbers
            of processes.
    """
    rank, world_size, local_rank, local_size, _ = placement
    timeout = timedelta(minutes=cfg.train.process_group_timeout)
    backend = "cpu:gloo,cuda:nccl" if device_of(cfg).type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # detectron2's own waits for 30 minutes, and release 0.6 takes no group of two backends.
    comm._get_global_gloo_group = lru_cache(
        partial(dist.new_group, backend="gloo", timeout=timeout)
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


def destroy_process_group() -> None:
    """End the process group and its threads, which may abort the interpreter as it goes."""
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()
    dist.destroy_process_group()


def _all_end(store: dist.Store, world_size: int) -> bool:
    """Whether all ranks come here, or only some."""
    begun = time.monotonic()
    try:
        ending = store.add("ending", 1)
        while ending < world_size and time.monotonic() < begun + _END_SECONDS:
            time.sleep(0.1)
            ending = store.add("ending", 0)
    except RuntimeError:  # as in `_count_mistakes`
        return False
    return ending >= world_size


def _count_mistakes(store: dist.Store, new: int) -> int:
    """How many ranks have a mistake, `new` ones of this rank included."""
    try:
        return store.add("mistakes", new)
    except RuntimeError:  # under srun the store is the first rank's: it has ended, and has said why
        return sys.maxsize
