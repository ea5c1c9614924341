"""The rank and world size of this process, as torchrun or srun sets them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mask_rcnn_plugin.config import ConfigError


class Placement(NamedTuple):
    """A process among those of a run. `url` is where they meet, as torch's rendezvous takes it."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


ALONE = Placement(rank=0, world_size=1, local_rank=0, local_size=1, url="")


def placement_from(environment: Mapping[str, str]) -> Placement | None:
    """What started this process as one of several; None if nothing did.

    torchrun's variables come first, so that it may run under srun. A shell inside an allocation is
    no step of several tasks, and so no process of several.

    Raises:
        ConfigError: for variables that are missing, wrong or of unequal numbers of tasks on nodes.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    present = [name for name in names if name in environment]
    if present:
        missing = [n for n in (*names, "MASTER_ADDR", "MASTER_PORT") if n not in environment]
        if missing:
            raise ConfigError(
                f"{present[0]} is set, but not {', '.join(missing)}: start with torchrun, which "
                f"sets them all, or unset {', '.join(present)}"
            )
        _number(environment, "MASTER_PORT")
        world_size, local_rank, local_size = (_number(environment, n) for n in names[1:])
        rank = _number(environment, "RANK", below=world_size)
        return Placement(rank, world_size, local_rank, local_size, "env://")
    if "SLURM_STEP_NUM_TASKS" in environment:
        world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
        if world_size > 1:
            return _slurm_task(environment, world_size)
    return None


def _slurm_task(environment: Mapping[str, str], world_size: int) -> Placement:
    tasks = _value(environment, "SLURM_STEP_TASKS_PER_NODE")  # "8", "8(x2)" or, unequal, "8(x2),4"
    equal = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if not equal:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}, must be the same number on each node: give "
            "srun --nodes and --ntasks-per-node"
        )
    # Slurm's ids grow by one, so that jobs on one node meet at different ports.
    port = 10_000 + _number(environment, "SLURM_JOB_ID") % 20_000
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    host = environment.get("MASTER_ADDR") or first_host(_value(environment, "SLURM_STEP_NODELIST"))
    return Placement(
        rank=_number(environment, "SLURM_PROCID", below=world_size),
        world_size=world_size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_size=int(equal[1]),
        url=f"tcp://{host}:{port}",
    )


def first_host(nodelist: str) -> str:
    """The first of Slurm's compressed host names: "gpu[07-09,12],login" begins with "gpu07"."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _value(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise ConfigError(f"{name} is not set, though srun has started several tasks")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, below: int | None = None) -> int:
    value = _value(environment, name)
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, must be a whole number")
    if below is not None and int(value) >= below:
        raise ConfigError(f"{name} is {value}, must be below the number of processes, {below}")
    return int(value)
