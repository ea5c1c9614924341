from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
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
