"""A step whose loss or gradient is not finite, in a file from which it can be repeated."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training.checkpoint import write_checkpoint


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss or gradient was not finite; the message says where, and what was written."""


def write_batch(path: Path, model: nn.Module, content: dict[str, Any]) -> None:
    """Write a batch and the weights it met, whole or not at all.

    Args:
        path: its folder is made.
        model: may be wrapped for DDP.
        content: "batch", the model's input; "random", from `random_state` before it; others of
            plain values.

    Raises:
        SaveError: if it cannot be written.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {**content, "model": model.state_dict()})


def read_batch(path: str) -> dict[str, Any]:
    """What `write_batch` wrote, on the CPU. It runs no code that the file may hold.

    Raises:
        UserError: if the file is none of these.
    """
    # What detectron2's mapper puts in a batch, beside tensors and plain values.
    classes = [Instances, Boxes, BitMasks, PolygonMasks, Keypoints]
    arrays = [np.ndarray, np.dtype, type(np.dtype("f4")), type(np.dtype("f8"))]
    reconstruct: Any = np.empty(0).__reduce__()[0]
    torch.serialization.add_safe_globals([*classes, *arrays, reconstruct])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not {"batch", "random", "model", "iteration"} <= content.keys():
            raise KeyError("it has no batch")
    except Exception as error:  # whatever a file that is something else brings up
        raise UserError(
            f"{path} is not a file that a training writes to nonfinite/ in its output folder "
            f"after a non-finite loss ({type(error).__name__})"
        ) from error
    return content
