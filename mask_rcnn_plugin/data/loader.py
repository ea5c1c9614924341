"""The training loader: its position can be saved, and it survives signals and unreadable images."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.data.mapper import ImageError
from mask_rcnn_plugin.data.sampler import Group, GroupSampler

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
    repeat_threshold: float = 0.0,
    max_unreadable: int = 100,
) -> "TrainLoader":
    """In place of detectron2's `build_detection_train_loader`, with a position that can be saved.

    detectron2's loader groups images by orientation after the sampler, separately in each process,
    so no one position tells which images are left. And its workers end at a cluster's signals.

    Args:
        dataset: detectron2's records, with "width" and "height".
        mapper: from a record to the model's input; an image that it raises `ImageError` for is
            left out.
        total_batch_size: images of a batch of all processes together.
        aspect_ratio_grouping: batches of landscape or of other images, which need less padding.
        num_workers: processes that load; 0 loads in this one.
        seed: of the shuffle, one for all processes; None draws one from NumPy's random state.
        repeat_threshold: images of classes that fewer than this share of the images have are drawn
            more often; see `repeat_factors_from_category_frequency` of detectron2's
            `RepeatFactorTrainingSampler`. 0: none are.
        max_unreadable: images that each process may leave out before it is an error; a resume
            counts anew.

    Raises:
        ConfigError: if `total_batch_size` is no multiple of the number of processes.
        DatasetError: if there is no image.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ConfigError(
            f"dataloader.train.total_batch_size is {total_batch_size}, must be a multiple of "
            f"{world_size}, the number of processes"
        )
    if not len(dataset):
        raise DatasetError("the training set has no image to train on")
    landscape = [aspect_ratio_grouping and r["width"] > r["height"] for r in dataset]
    repeats = None
    if repeat_threshold:
        count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        repeats = count(dataset, repeat_threshold)
    sampler = GroupSampler(landscape, total_batch_size // world_size, seed, repeats)
    return TrainLoader(
        _Mapped(list(dataset), mapper),
        sampler,
        num_workers=num_workers,
        max_unreadable=max_unreadable,
    )


class TrainLoader:
    """Batches without end, for one of the processes of a training; see `build_train_loader`.

    Its state is the sampler's position after the last batch handed over, the same in all processes.
    """

    def __init__(
        self, dataset: "_Mapped", sampler: GroupSampler, *, num_workers: int, max_unreadable: int
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._num_workers = num_workers
        self._max_unreadable = max_unreadable
        self._unreadable: dict[str, ImageError] = {}
        self.state_dict = sampler.state_dict
        self.load_state_dict = sampler.load_state_dict

    def __iter__(self) -> Iterator[list[Record]]:
        """Continue from the state that is set when the first batch is asked for.

        Raises:
            DatasetError: if more than `max_unreadable` images cannot be read.
        """
        # Workers get their seeds from a generator of their own: the training's stays untouched.
        # Others in each process and after a resume, or augmentations would be drawn again.
        position = self._sampler.seed % 2**64, self._sampler.position, comm.get_rank()
        seed = np.random.SeedSequence(position).generate_state(1, np.uint64)[0]
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=None,  # an item is a batch
            sampler=self._sampler,
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_init_worker,
            generator=torch.Generator().manual_seed(int(seed)),
        )
        for group, samples in loader:
            readable = self._readable(group, samples)
            self._sampler.advance_past(group)
            yield readable

    def _readable(self, group: Group, samples: list[Any]) -> list[Record]:
        kept = [sample for sample in samples if not self._left_out(sample)]
        if not kept:  # other processes would wait for one without a batch: it takes the next image
            first = group.images[-1] + 1
            following = map(self._dataset.sample, range(first, first + len(self._dataset)))
            kept = list(islice((s for s in following if not self._left_out(s)), 1))
        if not kept:
            raise DatasetError(f"no image of the training set can be read, e.g. {samples[0]}")
        return kept

    def _left_out(self, sample: Any) -> bool:
        """Whether it could not be read; logged once for each image, and counted."""
        if not isinstance(sample, ImageError):
            return False
        if sample.file_name not in self._unreadable:
            logger.warning("Left out of the training: %s", sample)
        self._unreadable[sample.file_name] = sample
        if len(self._unreadable) > self._max_unreadable:
            raise DatasetError(
                f"more than {self._max_unreadable} images of the training set cannot be read "
                "(dataloader.train.max_unreadable), e.g. "
                + "; ".join(map(str, list(self._unreadable.values())[:3]))
            )
        return True


class _Mapped(Dataset[tuple[Group, list[Any]]]):
    """Samples; not detectron2's `MapDataset`, which hides which image it replaces by which."""

    def __init__(self, records: list[Record], mapper: Callable[[Record], Record]) -> None:
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, group: Group) -> tuple[Group, list[Any]]:
        return group, [self.sample(image) for image in group.images]

    def sample(self, image: int) -> Any:
        """The sample of an image, counted around the end, or what is wrong with the image."""
        try:
            return self._mapper(self._records[image % len(self)])
        except ImageError as error:
            return error


def _init_worker(worker: int) -> None:
    """Seed a worker, and let it outlive the signals that the main process saves at.

    A cluster sends them to all processes, and a worker that ends takes the training with it before
    it has saved. The main process ends its workers by SIGTERM, which is heeded from it alone.
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
