"""The training loader: a shuffled stream whose position can be saved and gone back to."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.data.mapper import ImageError

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def build_train_loader(
    dataset: Sequence[Record],
    *,
    mapper: Callable[[Record], Record],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int | None = None,
    max_unreadable: int = 100,
) -> "TrainLoader":
    """In place of detectron2's `build_detection_train_loader`, whose stream cannot be gone on with.

    Args:
        dataset: detectron2's records, with "width" and "height".
        mapper: from a record to the model's input; an image that it raises `ImageError` for is
            left out.
        total_batch_size: images of a batch of all processes together.
        aspect_ratio_grouping: batches of landscape or of other images, which need less padding.
        num_workers: processes that load; 0 loads in this one.
        seed: of the shuffle, one for all processes; None draws one from NumPy's random state.
        max_unreadable: images that each process may leave out, counted anew from a resume on,
            before it is an error.

    Raises:
        ConfigError: if `total_batch_size` is no multiple of the number of processes.
        DatasetError: if there is no image.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ConfigError(
            f"dataloader.train.total_batch_size is {total_batch_size}, must be a multiple of the "
            f"{world_size} processes"
        )
    if not len(dataset):
        raise DatasetError("the training set has no image that is trained on")
    return TrainLoader(
        _Mapped(DatasetFromList(list(dataset), copy=False), mapper),
        [int(aspect_ratio_grouping and r["width"] > r["height"]) for r in dataset],
        total_batch_size // world_size,
        num_workers,
        comm.shared_random_seed() if seed is None else seed,
        max_unreadable,
    )


class TrainLoader:
    """Batches without end, for one of the processes of a training.

    All processes shuffle alike. Out of the one stream, epoch after epoch, come groups of a batch on
    a GPU, of one orientation each; the first process takes the first group, the second one the
    second. So after i batches in each of W processes the first i * W groups have been trained on,
    whatever more the workers have loaded by then, and any number of processes can go on from there:
    with groups of another size, if the batch on a GPU is another, out of the images that are left.
    Images that fill no group wait for the next epoch.

    Args:
        dataset: gives a model's input or `Unreadable`.
        orientations: 0 or 1 for each image; a group is of one.
        batch_size: images of a group.
        num_workers, seed, max_unreadable: see `build_train_loader`.
    """

    def __init__(
        self,
        dataset: "_Mapped",
        orientations: Sequence[int],
        batch_size: int,
        num_workers: int,
        seed: int,
        max_unreadable: int,
    ) -> None:
        self._dataset = dataset
        self._orientations = orientations
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._seed = seed
        self._max_unreadable = max_unreadable
        # Sizes of groups, and how many all processes were handed; the last one is in use.
        self._groups = [[batch_size, 0]]
        self._unreadable: dict[str, str] = {}

    def __iter__(self) -> Iterator[list[Record]]:
        """Go on from the state there is at the first batch.

        Raises:
            DatasetError: if more than `max_unreadable` images cannot be read.
        """
        world_size = comm.get_world_size()
        # Workers get their seeds from a generator of their own: the training's stays untouched.
        # Others in each process and after a resume, or augmentations would be drawn again.
        mixed = np.random.SeedSequence([self._seed % 2**64, self._handed_over(), comm.get_rank()])
        generator = torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=islice(self._groups_left(), comm.get_rank(), None, world_size),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_init_worker,
            generator=generator,
        )
        for batch in loader:
            readable = self._readable(batch)
            self._groups[-1][1] += world_size
            yield readable

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "images": len(self._dataset),
            "landscapes": sum(self._orientations),
            "groups": [list(part) for part in self._groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was, or with a new shuffle where it had other images."""
        self._seed, self._groups = state["seed"], [list(part) for part in state["groups"]]
        for key in ("images", "landscapes"):
            before, now = state[key], self.state_dict()[key]
            if before != now:
                logger.warning(
                    "%s of the training were %d before and are %d now: the epoch is not gone on "
                    "with, the images are shuffled anew",
                    *(key, before, now),
                )
                self._seed, self._groups = self._seed + self._handed_over() + 1, []
                break
        if not self._groups or self._groups[-1][0] != self._batch_size:
            self._groups.append([self._batch_size, 0])

    def _handed_over(self) -> int:
        return sum(number for _, number in self._groups)

    def _groups_left(self) -> Iterator[list[int]]:
        """Groups from the position on; those before it are formed again, and left out."""
        images: Iterator[int] = iter(_Stream(len(self._dataset), seed=self._seed))
        for batch_size, number in self._groups:
            waiting: tuple[list[int], list[int]] = [], []
            groups = self._grouped(images, batch_size, waiting)
            for _ in islice(groups, number):
                pass
            images = chain(*waiting, images)
        return groups

    def _grouped(
        self, images: Iterator[int], batch_size: int, waiting: tuple[list[int], list[int]]
    ) -> Iterator[list[int]]:
        """As detectron2's `GroupedBatchSampler`, which does not tell what waits for a group."""
        for image in images:
            group = waiting[self._orientations[image]]
            group.append(image)
            if len(group) == batch_size:
                full = group.copy()
                group.clear()
                yield full

    def _readable(self, batch: list[Any]) -> list[Record]:
        kept = [sample for sample in batch if not isinstance(sample, Unreadable)]
        for sample in batch:
            if isinstance(sample, Unreadable):
                self._leave_out(sample)
        if kept:
            return kept
        first = batch[-1].position + 1
        for i in range(first, first + len(self._dataset)):
            sample = self._dataset[i % len(self._dataset)]
            if not isinstance(sample, Unreadable):
                return [sample]
            self._leave_out(sample)
        raise DatasetError(f"no image of the training set can be read, e.g. {batch[0].reason}")

    def _leave_out(self, image: "Unreadable") -> None:
        if image.file_name in self._unreadable:
            return
        self._unreadable[image.file_name] = image.reason
        if len(self._unreadable) > self._max_unreadable:
            first = "; ".join(list(self._unreadable.values())[:3])
            raise DatasetError(
                f"more than {self._max_unreadable} images of the training set cannot be read "
                f"(dataloader.train.max_unreadable), e.g. {first}"
            )
        logger.warning("Left out of the training: %s", image.reason)


class Unreadable(NamedTuple):
    """Stands for a sample whose image the mapper could not read; `position` is in the dataset."""

    position: int
    file_name: str
    reason: str


class _Mapped(Dataset):
    """Samples; not detectron2's `MapDataset`, which hides which image it replaces by which."""

    def __init__(self, records: DatasetFromList, mapper: Callable[[Record], Record]) -> None:
        self._records = records
        self._mapper = mapper

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record | Unreadable:
        try:
            return self._mapper(self._records[index])
        except ImageError as error:
            return Unreadable(index, error.file_name, str(error))


class _Stream(TrainingSampler):
    """All images of all processes, in the order in which they are trained on."""

    def __iter__(self) -> Iterator[int]:
        return self._infinite_indices()


def _init_worker(worker: int) -> None:
    """Seed a worker, and let it outlive the signals that the main process saves at.

    A cluster sends SIGTERM or SIGUSR1 to all processes. A worker that ends takes the training with
    it, before it has saved; so SIGTERM is heeded only from the main process, which ends its workers
    by it.
    """
    worker_init_reset_seed(worker)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
