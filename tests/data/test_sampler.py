from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from mask_rcnn_plugin.data.sampler import Group, GroupSampler


def groups(sampler: GroupSampler, number: int) -> list[Group]:
    return list(islice(sampler, number))


@pytest.mark.parametrize("rank", [0, 1])
def test_single_images_come_in_the_order_of_detectron2s_sampler(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    expected = list(islice(TrainingSampler(7, seed=5), 20))
    assert [g.images for g in groups(GroupSampler([False] * 7, 1, seed=5), 20)] == [
        [image] for image in expected
    ]


def test_groups_are_of_one_orientation_and_the_rest_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    order = iter([[0, 3, 1, 2, 4], [4, 1, 3, 0, 2]])
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(next(order)))
    # 0, 1 and 4 are portraits.
    sampler = GroupSampler([False, False, True, True, False], 2, seed=0)
    assert groups(sampler, 4) == [
        Group([0, 1], 3, ([], [3])),
        Group([3, 2], 4, ([], [])),
        Group([4, 4], 6, ([], [])),
        Group([1, 0], 9, ([], [3])),
    ]


def test_a_position_is_gone_on_from_with_another_batch_size() -> None:
    """Of three that wait, a smaller batch takes two at once."""
    before = GroupSampler([False] * 8, 8, seed=1)
    state: dict[str, Any] = {**before.state_dict(), "position": 3, "waiting": [[5, 6, 7], []]}
    after = GroupSampler([False] * 8, 2, seed=99)
    after.load_state_dict(state)
    first, second = groups(after, 2)
    assert first == Group([5, 6], 3, ([7], []))
    assert second.images == [7, next(islice(TrainingSampler(8, seed=1), 3, None))]
    assert (after.position, after.state_dict()["seed"]) == (3, 1)


def test_a_state_is_plain_numbers(tmp_path: Any) -> None:
    """A checkpoint is read with weights_only=True."""
    sampler = GroupSampler([False, True] * 3, 4, seed=None)
    sampler.advance_past(groups(sampler, 3)[-1])
    torch.save(sampler.state_dict(), tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True) == sampler.state_dict()


def test_without_a_seed_it_is_drawn_from_numpys_random_state() -> None:
    np.random.seed(3)
    first, second = (GroupSampler([False] * 8, 1).seed for _ in range(2))
    np.random.seed(3)
    assert (GroupSampler([False] * 8, 1).seed, first != second) == (first, True)


def test_a_state_of_an_earlier_version_starts_the_epoch_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = GroupSampler([False] * 4, 2, seed=3)
    before = sampler.state_dict()
    sampler.load_state_dict({"seed": 1, "images": 4, "landscapes": 0, "groups": [[2, 5]]})
    assert sampler.state_dict() == before
    assert len(caplog.records) == 1


def one_of(monkeypatch: pytest.MonkeyPatch, world_size: int, rank: int) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    monkeypatch.setattr(comm, "get_rank", lambda: rank)


REPEATS = torch.tensor([1.0, 2.5, 1.25, 3.0, 1.0])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_repeated_images_come_in_the_order_of_detectron2s_sampler(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_of(monkeypatch, 3, rank)
    expected = list(islice(RepeatFactorTrainingSampler(REPEATS, seed=5), 40))
    sampler = GroupSampler([False] * 5, 1, seed=5, repeats=REPEATS)
    assert [g.images for g in groups(sampler, 40)] == [[image] for image in expected]


def test_images_are_drawn_as_often_as_they_repeat() -> None:
    """Of 8.75 images, the expected length of an epoch, image 1 is 2.5; 4 standard deviations."""
    sampler = GroupSampler([False] * 5, 1, seed=0, repeats=REPEATS)
    drawn = torch.tensor([g.images[0] for g in groups(sampler, 8750)])
    counts = torch.bincount(drawn, minlength=5) / 1000
    torch.testing.assert_close(counts, REPEATS, rtol=0, atol=4 * 0.5 / 1000**0.5)


def test_ranks_share_one_stream_of_repeated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> GroupSampler:
        return GroupSampler([False] * 5, 2, seed=2, repeats=REPEATS)

    stream = [g.images for g in groups(start(), 30)]
    for rank in range(3):
        one_of(monkeypatch, 3, rank)
        assert [g.images for g in groups(start(), 10)] == stream[rank::3]


@pytest.mark.parametrize("seen", [1, 4, 7, 11])
def test_repeated_images_are_gone_on_with_by_another_number_of_processes(
    seen: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    landscape = [False, True, True, False, False]
    whole = groups(GroupSampler(landscape, 2, seed=4, repeats=REPEATS), 24)
    before = GroupSampler(landscape, 2, seed=4, repeats=REPEATS)
    before.advance_past(groups(before, seen)[-1])
    torch.save(before.state_dict(), tmp_path / "state.pth")
    ranks = []
    for rank in range(2):
        one_of(monkeypatch, 2, rank)
        after = GroupSampler(landscape, 2, seed=99, repeats=REPEATS)
        after.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        ranks.append([g.images for g in groups(after, 6)])
    merged = [images for pair in zip(*ranks, strict=True) for images in pair]
    assert merged == [g.images for g in whole[seen : seen + 12]]


@pytest.mark.parametrize("repeats", [None, REPEATS])
def test_another_repetition_starts_the_epoch_anew(
    repeats: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A state without one is of a version that had none."""
    before = GroupSampler([False] * 5, 2, seed=1, repeats=repeats)
    state: dict[str, Any] = {**before.state_dict(), "position": 3, "waiting": [[0], []]}
    if repeats is None:
        del state["repetitions"]
    same = GroupSampler([False] * 5, 2, seed=9, repeats=repeats)
    same.load_state_dict(state)
    assert (same.position, same.seed, len(caplog.records)) == (3, 1, 0)
    other = GroupSampler([False] * 5, 2, seed=9, repeats=torch.full((5,), 1.5))
    other.load_state_dict(state)
    assert (other.position, other.seed) == (0, 9)
    assert "repetitions" in caplog.text
