import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.data.loader import TrainLoader, build_train_loader
from mask_rcnn_plugin.data.mapper import ImageError

# 8 landscapes, 4 portraits: with pairs, an epoch is 6 groups and leaves none over.
RECORDS = [
    {"index": i, "file_name": f"{i}.jpg", "width": 10, "height": 20 if i % 3 == 0 else 5}
    for i in range(12)
]


def mapper(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "pid": os.getpid()}


class Broken:
    """A mapper that cannot read some of the images."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        if record["file_name"] in self.names:
            raise ImageError(record["file_name"], "it is truncated")
        return record


def build(batch: int = 2, **settings: Any) -> TrainLoader:
    return build_train_loader(
        settings.pop("dataset", RECORDS),
        **{"mapper": mapper, "total_batch_size": batch, "seed": 3} | settings,
    )


def indices(batches: Iterator[list[dict[str, Any]]], number: int) -> list[tuple[int, ...]]:
    return [tuple(sample["index"] for sample in batch) for batch in islice(batches, number)]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process one of several."""

    def one_of(world_size: int, rank: int) -> None:
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)

    return one_of


def test_every_epoch_has_every_image_once_in_another_order() -> None:
    stream = iter(build())
    epochs = [indices(stream, 6) for _ in range(3)]
    for epoch in epochs:
        assert Counter(i for group in epoch for i in group) == Counter(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_groups_are_of_one_orientation_unless_that_is_off() -> None:
    def mixed(loader: TrainLoader) -> bool:
        return any(len({i % 3 == 0 for i in g}) > 1 for g in indices(iter(loader), 30))

    assert not mixed(build())
    assert mixed(build(aspect_ratio_grouping=False))


def test_images_that_fill_no_group_wait_for_the_next_epoch() -> None:
    # One portrait, groups of 4: the 4th epoch completes its group.
    dataset = [dict(r, height=20 if r["index"] == 0 else 5) for r in RECORDS[:9]]
    groups = indices(iter(build(4, dataset=dataset)), 9)
    assert groups.count((0, 0, 0, 0)) == 1
    assert Counter(i for g in groups for i in g if i)[1] == 4


def test_fewer_images_than_a_batch_are_enough() -> None:
    groups = indices(iter(build(8, dataset=RECORDS[:3])), 3)
    assert all(len(g) == 8 for g in groups)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_goes_on_where_others_were(
    before: int, after: int, workers: int, processes: Any
) -> None:
    expected = indices(iter(build()), 5 * before + 4 * after)
    seen: dict[int, tuple[int, ...]] = {}
    states = []
    for rank in range(before):
        processes(before, rank)
        loader = build(2 * before, num_workers=workers)
        for i, group in enumerate(indices(iter(loader), 5)):
            seen[before * i + rank] = group
        states.append(loader.state_dict())
    assert states == [states[0]] * before
    for rank in range(after):
        processes(after, rank)
        loader = build(2 * after, num_workers=workers, seed=99)
        loader.load_state_dict(states[0])
        for i, group in enumerate(indices(iter(loader), 4)):
            seen[5 * before + after * i + rank] = group
    assert [seen[i] for i in range(len(seen))] == expected


# World size, total batch and number of batches. The rest of the epoch comes one by one, or some of
# its images would wait for a group.
@pytest.mark.parametrize(
    "parts",
    [
        [(4, 12, 1), (2, 12, 1)],
        [(2, 12, 1), (4, 12, 1)],
        [(2, 6, 2), (3, 6, 1), (1, 6, 1)],
        [(1, 5, 2), (2, 4, 2), (1, 3, 1), (4, 4, 1), (2, 4, 1)],
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_no_image_is_seen_twice_or_left_out_when_the_batch_on_a_gpu_changes(
    parts: list[tuple[int, int, int]], workers: int, processes: Any
) -> None:
    dataset = [dict(RECORDS[i % 12], index=i) for i in range(36)]
    rest = 36 - sum(batch * number for _, batch, number in parts)
    seen: list[int] = []
    states: list[dict[str, Any]] = []
    for world_size, batch, number in [*parts, (1, 1, rest)]:
        resumed, states = states[:1], []
        for rank in range(world_size):
            processes(world_size, rank)
            loader = build(batch, dataset=dataset, num_workers=workers)
            for state in resumed:
                loader.load_state_dict(state)
            for group in indices(iter(loader), number):
                assert len(group) == batch // world_size
                assert len({i % 3 == 0 for i in group}) == 1
                seen += group
            states.append(loader.state_dict())
        assert states == [states[0]] * world_size
    assert sorted(seen) == list(range(36))


def test_the_state_is_that_of_the_first_batch_not_of_the_iterator(processes: Any) -> None:
    """detectron2's trainer makes the iterator before the checkpoint is loaded."""
    processes(1, 0)
    expected = indices(iter(build()), 8)
    first, second = build(), build(seed=99)
    stream = iter(second)
    indices(iter(first), 5)
    second.load_state_dict(first.state_dict())
    assert indices(stream, 3) == expected[5:]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dataset": RECORDS[:11]}, ["12 images", "11 now"]),
        ({"aspect_ratio_grouping": False}, ["8 landscapes", "0 now"]),
    ],
)
def test_a_position_without_a_meaning_is_said_to_be_dropped(
    changed: dict[str, Any], named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = build()
    indices(iter(before), 5)
    after = build(**changed)
    expected = after.state_dict()
    after.load_state_dict(before.state_dict())
    assert all(part in caplog.text for part in named)
    assert after.state_dict() == expected
    assert expected["position"] == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainings_random_states_are_left_alone(workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    indices(iter(build(num_workers=workers)), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_workers_draw_other_numbers_in_each_process_and_after_a_resume(processes: Any) -> None:
    def draws(record: dict[str, Any]) -> dict[str, Any]:
        return {"drawn": np.random.rand()}

    drawn: list[float] = []
    for rank in range(2):
        processes(2, rank)
        first, resumed = (build(4, mapper=draws, num_workers=2) for _ in range(2))
        start = list(islice(iter(first), 2))
        resumed.load_state_dict(first.state_dict())
        for batch in [*start, *islice(iter(resumed), 2)]:
            drawn += [sample["drawn"] for sample in batch]
    assert len(set(drawn)) == len(drawn) == 16


def test_without_a_seed_it_is_drawn_from_numpys() -> None:
    np.random.seed(5)
    a, b = build(seed=None), build(seed=None)
    np.random.seed(5)
    assert a.state_dict() == build(seed=None).state_dict() != b.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_left_out_and_named_once(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [tuple(i for i in g if i != 5) for g in indices(iter(build()), 12)]
    loader = build(mapper=Broken("5.jpg"), num_workers=workers)
    assert indices(iter(loader), 12) == expected
    messages = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert messages == [f"Left out of the training: {ImageError('5.jpg', 'it is truncated')}"]


def test_a_batch_of_none_takes_the_next_image_that_can_be_read() -> None:
    loader = build(1, mapper=Broken("5.jpg", "6.jpg", "11.jpg"))
    plain = indices(iter(build(1)), 24)
    # In the order of the dataset: 5 -> 7, past 6; 11 -> 0, around the end.
    expected = [{5: 7, 6: 7, 11: 0}.get(i, i) for (i,) in plain]
    assert [i for (i,) in indices(iter(loader), 24)] == expected


def test_too_many_unreadable_images_are_an_error() -> None:
    broken = Broken("1.jpg", "2.jpg", "4.jpg")
    assert len(indices(iter(build(mapper=broken, max_unreadable=3)), 12)) == 12
    message = r"more than 2 images .*max_unreadable\), e\.g\. .*\d\.jpg.*; .*\d\.jpg.*; .*truncated"
    with pytest.raises(DatasetError, match=message):
        indices(iter(build(mapper=broken, max_unreadable=2)), 12)


def test_no_readable_image_at_all_is_an_error_not_a_search_without_end() -> None:
    loader = build(mapper=Broken(*(r["file_name"] for r in RECORDS)))
    with pytest.raises(DatasetError, match="no image of the training set can be read, e.g. "):
        next(iter(loader))


def test_other_errors_of_the_mapper_are_not_swallowed() -> None:
    def fails(record: dict[str, Any]) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(iter(build(mapper=fails)))


@pytest.mark.parametrize(("batch", "world"), [(3, 2), (0, 1), (1, 2)])
def test_a_batch_that_cannot_be_shared_out_is_refused(
    batch: int, world: int, processes: Any
) -> None:
    processes(world, 0)
    with pytest.raises(ConfigError, match=f"total_batch_size is {batch}, must be a multiple of"):
        build(batch)


def test_no_image_is_an_error() -> None:
    with pytest.raises(DatasetError, match="the training set has no image"):
        build(dataset=[])


def test_signals_of_a_cluster_do_not_end_a_worker_but_its_parent_does() -> None:
    stream = iter(build(num_workers=1))
    pid = next(stream)[0]["pid"]
    assert pid != os.getpid()
    # From another process, as a cluster's would be.
    child = os.fork()
    if child == 0:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR1)
        os._exit(0)
    os.waitpid(child, 0)
    assert {sample["pid"] for batch in islice(stream, 20) for sample in batch} == {pid}

    def terminate() -> None:
        """As multiprocessing does; again, as a signal that meets another one is lost."""
        for _ in islice(stream, 10_000):
            os.kill(pid, signal.SIGTERM)

    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        terminate()


def test_images_of_rare_classes_are_drawn_more_often() -> None:
    """1 of 12 images has class 1: sqrt(0.75 / (1 / 12)) = 3 times an epoch; class 0 is common."""
    classes = [[0]] * 10 + [[0, 1], []]
    dataset = [
        {**record, "annotations": [{"category_id": c} for c in found]}
        for record, found in zip(RECORDS, classes)
    ]
    loader = build(batch=1, dataset=dataset, repeat_threshold=0.75)
    epoch = indices(iter(loader), 14)
    assert Counter(i for (i,) in epoch) == {**dict.fromkeys(range(12), 1), 10: 3}


def test_a_resume_goes_on_with_repeated_images() -> None:
    dataset = [{**r, "annotations": [{"category_id": r["index"] % 5 == 0}]} for r in RECORDS]
    settings = {"dataset": dataset, "repeat_threshold": 0.9}
    whole, first = iter(build(**settings)), build(**settings)
    expected = indices(whole, 20)
    indices(iter(first), 7)
    second = build(**settings, seed=8)
    second.load_state_dict(first.state_dict())
    assert indices(iter(second), 13) == expected[7:]
