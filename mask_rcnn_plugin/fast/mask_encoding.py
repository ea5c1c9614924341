"""From soft M x M masks in their boxes to COCO run-length encodings, one instance at a time.

Bilinear resizing is separable: over the w x h pixels around a box it is the product of two thin
matrices with the mask. What lies above the threshold there is encoded at once, so no bitmap of the
image is made.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

# The two matrix products and `grid_sample` add the same four float32 terms in another order, from
# positions of at most 2^6 cells: they differ by a few 1e-6 at most.
ROUNDING = 1e-5


def encode_masks(
    probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Resize each mask to its box, binarise it at `threshold` (Sec. 3.1) and encode it.

    The encodings are byte for byte those of detectron2's `paste_masks_in_image` on a CPU and
    pycocotools. Work and memory go with the area of one box after the other, not with R x H x W.

    Args:
        probs: (R, M, M), probabilities, on any device.
        boxes: (R, 4), pixels of the image (continuous coordinates); they may reach out of it. A
            mask whose box is empty, outside or not a number is empty.
        image_size: (H, W).
        threshold: in (0, 1]; a pixel of exactly this probability is inside.

    Returns:
        R COCO RLEs, {"size": [H, W], "counts": str}.
    """
    if len(probs) == 0:
        return []
    height, width = image_size
    corners = boxes.detach().cpu().float().numpy()
    # detectron2 looks at the box and one pixel around it.
    reach = np.concatenate([np.floor(corners[:, :2]) - 1, np.ceil(corners[:, 2:]) + 1], axis=1)
    windows = np.nan_to_num(reach.clip(0, [width, height] * 2)).astype(int)
    runs = []
    # Empty and non-finite boxes give positions that aren't numbers, which lie in no mask.
    with np.errstate(divide="ignore", invalid="ignore"):
        for prob, box, window in zip(probs.detach().cpu().float().numpy(), corners, windows):
            inside = _inside(prob, box, window, threshold)
            runs.append(_run_lengths(inside, window[:2], image_size))
    rles = coco_mask.frPyObjects(
        [{"size": [height, width], "counts": counts} for counts in runs], height, width
    )
    for rle in rles:
        rle["counts"] = rle["counts"].decode("ascii")
    return rles


def _inside(prob: np.ndarray, box: np.ndarray, window: np.ndarray, threshold: float) -> np.ndarray:
    """Which pixels of the window x0, y0, x1, y1 are in the mask: bool (w, h), columns first."""
    x = _positions(window[0], window[2], box[0], box[2])
    y = _positions(window[1], window[3], box[1], box[3])
    weights = _bilinear_weights(np.concatenate([x, y]), len(prob))
    values = weights[: len(x)] @ (prob.T @ weights[len(x) :].T)
    inside = values > np.float32(threshold + ROUNDING)
    # So written that NaN is in doubt as well: a product with NaN spreads it too far.
    outside = values < np.float32(threshold - ROUNDING)
    if np.count_nonzero(inside) + np.count_nonzero(outside) < inside.size:
        column, row = np.divmod(np.flatnonzero(inside == outside), len(y))
        grid = torch.from_numpy(np.stack([x[column], y[row]], axis=-1))
        exact = F.grid_sample(
            torch.from_numpy(prob)[None, None], grid[None, None], align_corners=False
        )
        inside[column, row] = exact[0, 0, 0].numpy() >= threshold
    return inside


def _positions(first: int, last: int, low: float, high: float) -> np.ndarray:
    """Centres of the pixels first .. last - 1 where the box side from low to high is [-1, 1].

    The order of operations is detectron2's, for the same float32 bits.
    """
    centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    return (centres - low) / (high - low) * 2 - 1


def _bilinear_weights(positions: np.ndarray, side: int) -> np.ndarray:
    """What each of the M cells along a side gives to each position: (n, M), two of them not 0."""
    cells = ((positions + 1) * side - 1) / 2
    return np.maximum(1 - np.abs(cells[:, None] - np.arange(side, dtype=np.float32)), 0)


def _run_lengths(inside: np.ndarray, origin: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Lengths of the runs of 0, 1, 0, ... of an image that holds `inside` at `origin` (x, y)."""
    height, width = image_size
    w, h = inside.shape
    # A run ends with its column, unless the next one goes on at the top of the image.
    stride = min(h + 1, height)
    flat = np.zeros(w * stride + 2, dtype=bool)
    flat[1:-1].reshape(w, stride)[:, :h] = inside
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), stride)
    borders = np.empty(len(row) + 2, dtype=np.int64)
    borders[0], borders[-1] = 0, height * width
    borders[1:-1] = (origin[0] + column) * height + origin[1] + row
    lengths = borders[1:] - borders[:-1]
    return lengths if lengths[-1] else lengths[:-1]
