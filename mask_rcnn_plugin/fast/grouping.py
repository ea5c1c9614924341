"""Rows that belong to images, levels or classes, regrouped in few operators."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def owners(counts: Sequence[int], like: Tensor) -> Tensor:
    """The group of each row, the first counts[0] rows being group 0's: int64 (sum,)."""
    return torch.cat([torch.full((n,), i, device=like.device) for i, n in enumerate(counts)])


def grouped(groups: Tensor, num_groups: int) -> tuple[Tensor, list[int]]:
    """The rows of each group one after the other, at one wait for the device.

    Args:
        groups: int64 (R,), which group each row is of.

    Returns:
        int64 (R,): the rows, in their order within a group.
        How many are of each group.
    """
    each = torch.arange(num_groups, device=groups.device)
    counts = (groups == each[:, None]).sum(dim=1)
    return groups.argsort(stable=True), counts.tolist()


def padded(tensors: Sequence[Tensor], value: float = 0) -> Tensor:
    """(N, L, ...) of N tensors (its L, ...), L being that of the longest, but at least 1."""
    one = tensors[0].new_full((1, *tensors[0].shape[1:]), value)
    return pad_sequence([*tensors, one], batch_first=True, padding_value=value)[:-1]
