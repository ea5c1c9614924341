"""The highest pixel of each heatmap resized to its box, in few kernels and two reads of the device.

As in `keypoint_decoding`, bounds from the 4 x 4 cells around a patch tell how high its pixels may
be. Here shapes are fixed: of each map the patches of the highest bounds are resized, and where one
that is left might hold a higher pixel, as on a flat map, the map is resized whole. The number of
operators depends only on how many chunks bound the memory.

The arithmetic rounds as `F.interpolate` does on CPUs with fused multiply-add, bit by bit, so that
the same pixel wins where rounding decides. On a GPU its last bits may differ.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Patches of a map that get a closer bound, and those that are resized.
BOUNDED, RESIZED = 128, 32
# Pixels that are resized at once, in about 1.5 GB.
PIXELS_AT_ONCE = 50_000_000


def highest_pixels(logits: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The highest pixel of each map after bicubic resizing; the first in case of a tie.

    Args:
        logits: float32 (R, K, M, M), R > 0.
        sizes: float32 (R, 2): width and height that the maps of a RoI are resized to, pixels.

    Returns:
        float32 (R, K, 2): x and y of that pixel, counted from 0.
        float32 (R, K): its logit.

    Raises:
        ValueError, OverflowError: if a size is not finite.
    """
    num_keypoints, side = logits.shape[1:3]
    order = sizes.amax(dim=1).argsort()
    # The first read: shapes of what follows.
    shapes = [(int(width), int(height)) for width, height in sizes[order].tolist()]
    padded = F.pad(logits[order].contiguous(), (2, 2, 2, 2), mode="replicate")
    patches, weights = _along_axes(sizes[order], side, max(map(max, shapes)))

    found = []
    areas = [RESIZED * _most_pixels(w, side) * _most_pixels(h, side) for w, h in shapes]
    for chunk, _ in _chunks([(num_keypoints, max((side + 4) ** 2, area)) for area in areas]):
        most = [_most_pixels(max(lengths), side) for lengths in zip(*shapes[chunk])]
        found.append(_search(padded[chunk], patches[chunk], weights[chunk], *most))
    pixels, highest, is_clear = (torch.cat(x).flatten(0, 1) for x in zip(*found))

    # The second read: how many maps are not clear. They are sorted to the front.
    left = [i // num_keypoints for i, clear in enumerate(is_clear.tolist()) if not clear]
    unclear = is_clear.byte().argsort(stable=True)[: len(left)]
    for chunk, (width, height) in _chunks([shapes[roi] for roi in left]):
        maps = unclear[chunk]
        rois = maps // num_keypoints
        pixels[maps], highest[maps] = _resize_whole(
            padded.flatten(0, 1)[maps], patches[rois], weights[rois], width, height
        )
    back = order.argsort()
    return pixels.view(-1, num_keypoints, 2)[back], highest.view(-1, num_keypoints)[back]


def _most_pixels(length: int, side: int) -> int:
    """How many of `length` pixels a patch, one of `side` cells wide, may have."""
    return -(-length // side) + 1


def _chunks(shapes: list[tuple[int, int]]) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Runs of `shapes`, and the largest width and height in each, to which all are padded."""
    start, widest, highest = 0, 0, 0
    for i, (width, height) in enumerate(shapes):
        padded = max(widest, width), max(highest, height)
        if i > start and (i + 1 - start) * padded[0] * padded[1] > PIXELS_AT_ONCE:
            yield slice(start, i), (widest, highest)
            start, padded = i, (width, height)
        widest, highest = padded
    if shapes:
        yield slice(start, len(shapes)), (widest, highest)


def _along_axes(sizes: Tensor, side: int, length: int) -> tuple[Tensor, Tensor]:
    """How pixels are resized from cells, along x and y.

    Args:
        sizes: float32 (R, 2), at most `length`.

    Returns:
        int64 (R, 2, L): the patch each pixel lies in, patch i being before the centre of cell i.
            From the end of a box on its last pixel is repeated.
        float64 (R, 2, L, 4): weights of the four cells around the pixel.
    """
    pixels = torch.arange(length, device=sizes.device).minimum(sizes[..., None] - 1)
    # Not side / sizes, which torch rounds twice.
    steps = (torch.full_like(sizes, side) / sizes)[..., None]
    positions = _multiply_add(steps.double(), pixels + 0.5, -0.5)
    below = positions.floor()
    t = positions - below
    t = torch.stack([t, 1 - t], dim=-1)  # from the cells next to the pixel
    near = _multiply_add(t.double(), 1.25, -2.25) * t * t + 1
    t = t + 1  # from those beyond
    far = _multiply_add(_multiply_add(t.double(), -0.75, 3.75).double(), t, -6) * t + 3
    weights = torch.stack([far[..., 0], near[..., 0], near[..., 1], far[..., 1]], dim=-1)
    return below.long() + 1, weights.double()


def _search(
    padded: Tensor, patches: Tensor, weights: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The highest pixel of the most promising patches, of at most `width` x `height` pixels each.

    Args:
        padded: (R, K, M + 4, M + 4), maps whose borders are repeated twice.

    Returns:
        The pixel, float32 (R, K, 2); its logit, (R, K); bool (R, K): whether all others are lower.
    """
    per_side = padded.shape[2] - 3  # patches
    cells = padded[..., 2:-2, 2:-2]
    # The control points of a patch are next to its corners.
    bound = F.max_pool2d(bound_control_points(padded), 2, stride=1, padding=1)

    # The pixels of a patch go from `first` to `last`, if it has any.
    index = torch.arange(max(per_side, *padded.shape[:2]), device=padded.device)
    every = index[:per_side].expand(len(padded), 2, -1).contiguous()
    first = torch.searchsorted(patches, every)
    last = torch.searchsorted(patches, every, right=True) - 1
    has_none = last < first
    has_none = has_none[:, None, 1, :, None] | has_none[:, None, 0, None, :]
    bound = bound.masked_fill_(has_none, -torch.inf).flatten(2)
    bound, chosen = bound.topk(min(BOUNDED, per_side**2))
    at = torch.stack([chosen % per_side, chosen // per_side], dim=3)  # (R, K, P, 2), x and y
    roi, keypoint = index[: len(padded), None, None], index[: padded.shape[1], None]
    around = padded.unfold(2, 4, 1).unfold(3, 4, 1)[roi, keypoint, at[..., 1], at[..., 0]]
    closer = control_points(around).amax(dim=(3, 4)).minimum(bound)
    closer, best = closer.topk(min(RESIZED, per_side**2))
    left = bound[..., -1].maximum(closer[..., -1])

    at, around = at[roi, keypoint, best], around[roi, keypoint, best]
    roi, axis = roi[..., None], index[:2]
    offsets = torch.arange(max(width, height), device=padded.device)
    # (R, K, P, 2, n)
    pixels = (first[roi, axis, at][..., None] + offsets).minimum(last[roi, axis, at][..., None])
    weights = weights[roi[..., None], axis[:, None], pixels.clamp_(min=0)]
    rows = _weigh(around[..., None, :], weights[..., 0, None, :width, :])
    values = _weigh(rows.mT[..., None, :, :], weights[..., 1, :height, None, :])

    # The first of those that are equal, of each patch and then of all.
    values, within = values.flatten(3).max(dim=3)
    values = values.masked_fill_(closer == -torch.inf, -torch.inf)
    x = pixels[..., 0, :].gather(3, (within % width)[..., None])[..., 0]
    y = pixels[..., 1, :].gather(3, (within // width)[..., None])[..., 0]
    highest = values.amax(dim=2)
    length = patches.shape[2]
    place = (y * length + x).masked_fill_(values < highest[..., None], length**2).amin(dim=2)
    pixel = torch.stack([place % length, place // length], dim=2).float()
    rounding = torch.finfo(torch.float32).eps * (2 * per_side + 32)
    rounding = rounding * torch.linalg.vector_norm(cells, torch.inf, dim=(2, 3))
    return pixel, highest, left + rounding < highest


def bound_control_points(padded: Tensor) -> Tensor:
    """Of maps (..., M + 4, M + 4) whose borders are repeated twice: what the control points next to
    a cell are at most, (..., M, M)."""
    padded = padded[..., 1:-1, 1:-1]
    dx = padded[..., 2:] - padded[..., :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    dxy = dx[..., 2:, :] - dx[..., :-2, :]
    bound = padded[..., 1:-1, 1:-1].add(dx[..., 1:-1, :].abs_(), alpha=1 / 4)
    return bound.add_(dy.abs_(), alpha=1 / 4).add_(dxy.abs_(), alpha=1 / 16)


def control_points(cells: Tensor) -> Tensor:
    """Those of the patch in the middle of (..., 4, 4) cells. torch's bicubic kernel makes the slope
    at a cell 3/4 of the difference of its neighbours; control points are 1/3 of a side away."""
    for _ in range(2):
        before, left, right, after = cells.unbind(dim=-1)
        near_left = left.add(right - before, alpha=1 / 4)
        near_right = right.sub(after - left, alpha=1 / 4)
        cells = torch.stack([left, near_left, near_right, right], dim=-1).mT
    return cells


def _resize_whole(
    padded: Tensor, patches: Tensor, weights: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """The highest pixels (N, 2) of padded maps (N, M + 4, M + 4), and their logits."""
    columns = _resize_along(padded.mT, patches[:, 0, :width], weights[:, 0, :width])
    values = _resize_along(columns.mT, patches[:, 1, :height], weights[:, 1, :height])
    highest, place = values.flatten(1).max(dim=1)
    return torch.stack([place % width, place // width], dim=1).float(), highest


def _resize_along(maps: Tensor, patches: Tensor, weights: Tensor) -> Tensor:
    """(N, M + 4, C) padded maps to (N, L, C)."""
    n = torch.arange(len(maps), device=maps.device)[:, None, None]
    cells = maps[n, patches[..., None] + torch.arange(4, device=maps.device)]
    return _weigh(cells.mT, weights[:, :, None])


def _weigh(cells: Tensor, weights: Tensor) -> Tensor:
    """Sum of four cells, float32, times their weights, float64, both (..., 4), rounded as
    `F.interpolate` does it."""
    a, b, c, d = cells.unbind(dim=-1)
    i, j, k, m = weights.unbind(dim=-1)
    sums = _multiply_add(a, i, (b * j).float())
    return _multiply_add(d, m, _multiply_add(c, k, sums))


def _multiply_add(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32 values, rounded once: one of a and b has them in float64."""
    return (a * b).add_(c).float()
