"""Many tensors to a device in one copy."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 8  # bytes, of the widest dtype


def move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device, as views of one memory there.

    On CUDA the copy goes from pinned memory, so that the host doesn't wait for it.

    Args:
        tensors: on the CPU, of any dtypes and shapes.
        device: where they go to.
    """
    sizes = [-(-t.numel() * t.element_size() // _ALIGNED) * _ALIGNED for t in tensors]
    is_pinned = device.type == "cuda"
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=is_pinned)
    for tensor, part in zip(tensors, packed.split(sizes)):
        size = tensor.numel() * tensor.element_size()
        part[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    packed = packed.to(device, non_blocking=True)
    return [
        part[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        for t, part in zip(tensors, packed.split(sizes))
    ]
