"""Many tensors in one copy."""

import torch

from mask_rcnn_plugin.fast.transfer import move_together


def test_all_arrive_as_they_were() -> None:
    given = [
        torch.arange(15, dtype=torch.uint8).view(3, 5),
        torch.randn(2, 3, 3),
        torch.randint(99, (7,)),
        torch.rand(2, 2) > 0.5,
        torch.zeros(0, 4),
        torch.randn(4, 6).t()[::2],  # not contiguous
        torch.tensor(2.5, dtype=torch.float64),
        torch.randn(3).half(),
    ]
    moved = move_together(given, torch.device("cpu"))
    for before, after in zip(given, moved, strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after.equal(before)
    moved[0].fill_(7)
    assert moved[1].equal(given[1])
    assert given[0][0, 0] == 0


def test_none() -> None:
    assert move_together([], torch.device("cpu")) == []
