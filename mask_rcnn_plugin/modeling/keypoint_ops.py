"""Keypoint targets, loss and decoding (Sec. 5) as functions of tensors.

A keypoint type is a one-hot M x M mask of the RoI: the branch gives logits over the M^2 cells, the
K types independently of each other.

Decoding looks for the highest pixel of each map resized to its box, without resizing the map: a
bicubic pixel is a weighted sum of 4 x 4 cells, so only where the inner four are high enough can it
exceed a pixel known already. A handful of 4 x 4 patches a map are left.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.structures import Keypoints
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import Tensor

# Weights of the four cells around a point as polynomials of its offset from the second: a row for
# each power from 0, a column for each cell. torch's bicubic kernel, of parameter -3/4.
KERNEL = [
    [0.0, 1.0, 0.0, 0.0],
    [-0.75, 0.0, 0.75, 0.0],
    [1.5, -2.25, 1.5, -0.75],
    [-0.75, 1.25, -1.25, 0.75],
]
# The two outer of the four weights along a side are negative and add up to this at most; the two
# inner ones exceed 1 by as much.
OUTER = 3 / 16
# Relative to the highest absolute logit of a map; two float32 sums of the same 16 terms, at
# positions a bit apart, differ by less.
ROUNDING = 1e-5
# The share of a map's patches above which resizing all of it is faster.
MANY = 1 / 16


def encode_keypoints(keypoints: Tensor, boxes: Tensor, heatmap_side: int) -> tuple[Tensor, Tensor]:
    """The cell of its RoI in which each keypoint lies.

    Args:
        keypoints: float (R, K, 3): x, y in image pixels (continuous) and visibility, 0 for not
            labelled, 1 for labelled but hidden, 2 for visible.
        boxes: (R, 4), image pixels.
        heatmap_side: M.

    Returns:
        cells: int64 (R, K), row * M + column; 0 where there is no target.
        has_target: bool (R, K), whether the keypoint is labelled and inside its RoI.
    """
    cells, has_target = Keypoints(keypoints).to_heatmap(boxes, heatmap_side)
    shape = keypoints.shape[:2]  # detectron2 flattens it if R = 0
    return cells.view(shape), has_target.view(shape) > 0


def keypoint_loss(
    logits: Tensor, cells: Tensor, has_target: Tensor, normalizer: float | None = None
) -> Tensor:
    """Cross-entropy over an M^2-way softmax for each labelled keypoint (Sec. 5).

    Args:
        logits: (R, K, M, M).
        cells: int64 (R, K), target cells.
        has_target: bool (R, K); the other keypoints take no part.
        normalizer: what the sum is divided by; the number of targets if None.

    Returns:
        Scalar, float32 or wider; 0 with a zero gradient if there is no target.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if not logits.shape[:2] == cells.shape == has_target.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, cells {tuple(cells.shape)} and has_target "
            f"{tuple(has_target.shape)}: must be (R, K, M, M), (R, K) and (R, K)"
        )
    num_targets = int(has_target.sum())
    if num_targets == 0:
        return logits.sum() * 0
    picked = logits.flatten(2)[has_target]
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    loss = F.cross_entropy(picked, cells[has_target], reduction="sum")
    return loss / (num_targets if normalizer is None else normalizer)


def decode_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """Most likely position of each keypoint, as detectron2's `heatmaps_to_keypoints` finds it.

    Args:
        logits: (R, K, M, M).
        boxes: (R, 4), image pixels, in which the logits live; a side below a pixel counts as one.

    Returns:
        (R, K, 3): x, y in image pixels (continuous coordinates) and score: exp of the highest
        logit after bicubic resizing to the box, over the sum of exp over the M^2 cells. At most 1
        but for the overshoot of the resizing.
    """
    logits, boxes = logits.detach().float(), boxes.detach().float()
    points = logits.new_zeros(*logits.shape[:2], 3)
    is_clear = torch.ones_like(points[..., 0], dtype=torch.bool)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sizes.ceil()
    for r, (width, height) in enumerate(pixels.long().tolist()):
        points[r], is_clear[r] = _highest_pixels(logits[r], height, width)
    points[..., :2] = (points[..., :2] + 0.5) * (sizes / pixels)[:, None] + boxes[:, None, :2]
    peaks = points[..., 2]
    points[..., 2] = 1 / (logits - peaks[..., None, None]).exp_().sum(dim=(2, 3))
    # Where rounding decides, as on a flat map, it has to be detectron2's.
    for r in (~is_clear).any(dim=1).nonzero().flatten().tolist():
        unclear = ~is_clear[r]
        # Columns of the answer: x, y, logit, score.
        theirs = heatmaps_to_keypoints(logits[r, unclear][None], boxes[r][None])
        points[r, unclear] = theirs[0, :, [0, 1, 3]]
    return points


def _highest_pixels(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The highest pixel of each map after bicubic resizing.

    Args:
        maps: float32 (K, M, M).
        height, width: what the maps are resized to, pixels.

    Returns:
        float32 (K, 3): column, row and value of that pixel, where it is clear.
        bool (K,): whether it is clear, all others being lower by more than rounding.
    """
    num_maps, side = maps.shape[:2]
    row_step, column_step = side / height, side / width
    rounding = ROUNDING * maps.abs().amax(dim=(1, 2))
    # Patch (i, j) is the 4 x 4 cells behind the pixels between the centres of cells i - 1 and i,
    # j - 1 and j. Cells beyond the border repeat it.
    padded = F.pad(maps[None], (2, 2, 2, 2), mode="replicate")[0]
    patches = padded.unfold(1, 4, 1).unfold(2, 4, 1)  # (K, M + 1, M + 1, 4, 4), a view
    # An upper bound of the pixels of a patch: the weights of its inner cells and of its corners are
    # positive, the other eight negative; the corners may be as high as the map's highest cell.
    inner = _slide(torch.maximum, padded[:, 1:-1, 1:-1], 1)
    outer = _slide(torch.minimum, _slide(torch.minimum, padded, 1), 2)
    top, cell = maps.flatten(1).max(dim=1)
    bound = (1 + OUTER) ** 2 * inner + OUTER**2 * top[:, None, None]
    bound -= 2 * OUTER * (1 + OUTER) * outer

    # The highest pixel is no lower than the one nearest to the highest cell.
    i, y = _locate(((cell // side + 0.5) / row_step).floor().clamp(max=height - 1), row_step)
    j, x = _locate(((cell % side + 0.5) / column_step).floor().clamp(max=width - 1), column_step)
    k = torch.arange(num_maps, device=maps.device)
    known = _interpolate(patches[k, i, j], y[:, None], x[:, None])
    may_exceed = bound >= known - rounding[:, None, None]
    may_exceed &= may_exceed.float().mean(dim=(1, 2), keepdim=True) <= MANY
    k, i, j = may_exceed.nonzero().unbind(dim=1)

    rows, y, is_row = _pixels_of(i, row_step, height)
    columns, x, is_column = _pixels_of(j, column_step, width)
    values = _interpolate(patches[k, i, j], y, x)  # (patches, rows, columns)
    values.masked_fill_(~(is_row[:, :, None] & is_column[:, None]), -torch.inf)
    highest = values.new_full((num_maps,), -torch.inf)
    highest.scatter_reduce_(0, k, values.amax(dim=(1, 2)), "amax")
    is_highest = values >= (highest - rounding)[k, None, None]
    # A sum over a map's patches finds the one pixel that is highest, or counts several.
    count = is_highest.sum(dim=(1, 2)).float()
    column = (is_highest.any(dim=1) * columns).sum(dim=1)
    row = (is_highest.any(dim=2) * rows).sum(dim=1)
    sums = maps.new_zeros(num_maps, 3).index_add_(0, k, torch.stack([column, row, count], dim=1))
    return torch.cat([sums[:, :2], highest[:, None].float()], dim=1), sums[:, 2] == 1


def _slide(extremum: Callable[[Tensor, Tensor], Tensor], maps: Tensor, step: int) -> Tensor:
    """The extremum of each cell and those `step` to the right, below, and both: (K, n, m) to
    (K, n - step, m - step)."""
    maps = extremum(maps[:, :-step], maps[:, step:])
    return extremum(maps[:, :, :-step], maps[:, :, step:])


def _locate(pixels: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Along one side, the patches on which pixels depend, and where in [0, 1) between the patch's
    second and third cell they lie; a pixel is `step` cells wide."""
    positions = (pixels + 0.5) * step - 0.5
    below = positions.floor()
    return below.long() + 1, positions - below


def _pixels_of(patches: Tensor, step: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one side of `size` pixels, those that depend on each of P patches.

    Returns:
        float32 (P, n): pixels, n being what the largest patch may have.
        float32 (P, n): their offsets, see `_locate`.
        bool (P, n): which of them are the patch's indeed.
    """
    first = ((patches - 0.5) / step - 0.5).floor()
    pixels = first[:, None] + torch.arange(math.ceil(1 / step) + 1, device=patches.device)
    owners, offsets = _locate(pixels, step)
    return pixels, offsets, (owners == patches[:, None]) & (pixels >= 0) & (pixels < size)


def _interpolate(patches: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bicubic interpolation in 4 x 4 patches: (P, 4, 4) at offsets (P, n) and (P, m) to (P, n, m).

    In float64, which neither autocast nor TF32 touches.
    """
    kernel = torch.tensor(KERNEL, dtype=torch.float64, device=patches.device)
    y_weights = torch.linalg.vander(y.double(), N=4) @ kernel  # (P, n, 4)
    x_weights = torch.linalg.vander(x.double(), N=4) @ kernel
    return y_weights @ patches.double() @ x_weights.mT
