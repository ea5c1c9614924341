"""A step whose loss or gradient is not finite, in a file from which it can be repeated."""

from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from mask_rcnn_plugin.errors import UserError


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss or gradient was not finite; the message says where, and what was written."""


def read_batch(path: str) -> dict[str, Any]:
    """What a `GuardedTrainer` wrote, on the CPU. It runs no code that the file may hold.

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
