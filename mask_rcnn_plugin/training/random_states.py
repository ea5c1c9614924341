"""Random states of a training: restored by a resume, and kept from what must not change them."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import Tensor

logger = logging.getLogger(__name__)


def random_state() -> dict[str, Tensor]:
    """What a model draws from: torch's states, of the CPU and the process's own GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Go on with what `random_state` has returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


class RandomStates:
    """Those of Python, NumPy and torch, its GPU's included, of each process; for a checkpoint."""

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """What `torch.load(weights_only=True)` takes; all processes call it, the main one has all.

        Returns:
            {"ranks": states in the order of the ranks, empty on others than the main process}.
        """
        return {"ranks": comm.gather(_states())}

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        """Go on with the states, or with new ones if the number of processes has changed."""
        ranks, world_size = state["ranks"], comm.get_world_size()
        if len(ranks) == world_size:
            _set_states(ranks[comm.get_rank()])
            return
        logger.warning(
            f"The checkpoint has random states of {len(ranks)} processes, but the run has "
            f"{world_size} now: they are reseeded"
        )
        seed_all_rng(comm.shared_random_seed() + comm.get_rank())


@contextmanager
def random_states_kept() -> Iterator[None]:
    """What is drawn inside the block does not change what is drawn after it."""
    states = _states()
    try:
        yield
    finally:
        _set_states(states)


def _states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = [name, torch.tensor(np.asarray(keys, np.int64)), *rest]
    return {"python": random.getstate(), "numpy": numpy, "torch": random_state()}


def _set_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    set_random_state(states["torch"])
