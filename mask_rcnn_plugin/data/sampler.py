"""The order in which images are trained on, and a position in it to continue from."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)

Buckets = tuple[list[int], list[int]]


class Group(NamedTuple):
    """The images of a process's next batch, and the sampler's position after it."""

    images: list[int]
    position: int
    waiting: Buckets


class GroupSampler(Sampler[Group]):
    """An endless stream of groups, each the batch of one process, of one orientation.

    All processes draw the same images: one permutation of the dataset per epoch, as detectron2's
    `TrainingSampler` does. An image waits in the bucket of its orientation until a group is full,
    if need be into the next epoch. The first process takes the first group, the second process the
    second one, and so on.

    The position is the same for all processes: how many images were drawn, and which of them still
    wait. Any number of processes and any batch size can continue from it, and no image of the epoch
    is seen twice or left out.

    Args:
        landscape: for each image, whether it is wider than high; all False: no grouping.
        batch_size: images of a group.
        seed: of the shuffle; None draws one from NumPy's random state, for all processes together.
        repeats: float (images,), how often an epoch has each image, on average: a fraction is
            rounded up or down at random in each epoch, as detectron2's
            `RepeatFactorTrainingSampler` does it, in its order. None: once.
    """

    def __init__(
        self,
        landscape: Sequence[bool],
        batch_size: int,
        seed: int | None = None,
        repeats: torch.Tensor | None = None,
    ) -> None:
        self._landscape = landscape
        self._batch_size = batch_size
        self._repeats = repeats
        self._repetitions = 0.0 if repeats is None else math.fsum((repeats - 1).tolist())
        self.seed = comm.shared_random_seed() if seed is None else seed
        self.position = 0
        self._waiting: Buckets = [], []

    def __iter__(self) -> Iterator[Group]:
        """Start at the position that the sampler has when the first group is asked for."""
        position, images = self.position, islice(self._shuffled(), self.position, None)
        waiting = self._waiting[0].copy(), self._waiting[1].copy()
        while True:
            groups: list[list[int]] = []
            while len(groups) < comm.get_world_size():
                full = [bucket for bucket in waiting if len(bucket) >= self._batch_size]
                if full:
                    groups.append(full[0][: self._batch_size])
                    del full[0][: self._batch_size]
                else:
                    image = next(images)
                    waiting[self._landscape[image]].append(image)
                    position += 1
            mine = groups[comm.get_rank()]
            yield Group(mine, position, (waiting[0].copy(), waiting[1].copy()))

    def _shuffled(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        epoch = torch.arange(len(self._landscape))
        while True:
            images = epoch
            if self._repeats is not None:
                often = self._repeats.floor()
                often += torch.rand(len(epoch), generator=generator) < self._repeats - often
                images = epoch.repeat_interleave(often.long())
            yield from images[torch.randperm(len(images), generator=generator)].tolist()

    def advance_past(self, group: Group) -> None:
        """Move the position past a group that the training has got; workers draw further ahead."""
        self.position, self._waiting = group.position, group.waiting

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "images": len(self._landscape),
            "landscapes": sum(self._landscape),
            "repetitions": self._repetitions,
            "position": self.position,
            "waiting": list(self._waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another sampler was, or stay at the start if it had other images.

        So does the state of an earlier version, which counted groups.
        """
        if "position" not in state:
            logger.warning("The checkpoint is from an older version: the epoch starts over")
            return
        own = self.state_dict()
        for key in ("images", "landscapes", "repetitions"):
            # An earlier version had no repetitions.
            if state.get(key, 0) != own[key]:
                logger.warning(
                    "The training set had %d %s before and has %d now: the epoch starts over",
                    *(state.get(key, 0), key, own[key]),
                )
                return
        self.seed, self.position = state["seed"], state["position"]
        self._waiting = state["waiting"][0], state["waiting"][1]
