"""From heatmaps to keypoints (Sec. 5): detectron2's `heatmaps_to_keypoints`, several times faster.

The highest pixel of each map, resized to its box, is found without resizing the map. Inside a
patch, the square between the centres of 2 x 2 cells, the resized map is a polynomial of the 4 x 4
cells around it. In Bézier form that is a weighted mean of 4 x 4 control points, so no pixel exceeds
the highest of them. Only a few patches of a map can then exceed a pixel that is known already, and
all maps are searched at once.

How much is searched depends on the maps. A GPU would wait for the host at every step, so there
`keypoint_search` does the same with fixed shapes.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import Tensor

from mask_rcnn_plugin.fast.keypoint_search import (
    bound_control_points,
    control_points,
    highest_pixels,
)

# A map with more patches left is flat or noisy: resizing it as a whole is faster.
MAX_PATCHES = 128
# RoIs searched at once, which bounds the memory.
ROIS_AT_ONCE = 8
# Logits that are lower than the highest by more add nothing to a score, and their exp is slow.
NEGLIGIBLE = 80


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
    if torch.jit.is_scripting():
        return heatmaps_to_keypoints(logits, boxes)[:, :, [0, 1, 3]]
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return decode_whole(logits, boxes)
    if torch.jit.is_tracing():  # which would fix what is searched
        return heatmaps_to_keypoints(logits, boxes)[:, :, [0, 1, 3]]
    return (decode_at_once if logits.is_cuda else decode_by_need)(logits, boxes)


def decode_whole(logits: Tensor, boxes: Tensor) -> Tensor:
    """`decode_keypoints` for ONNX and `torch.export`: the same operators for all maps and boxes.

    Every map of a keypoint is resized to the largest box, up to an image for each of the RoIs.
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels, side = sizes.ceil(), logits.shape[2]
    longest = F.pad(pixels, (0, 0, 0, 1), value=1).amax(dim=0).long()
    lengths = longest.unbind() if torch.jit.is_tracing() else longest.tolist()
    cells = torch.arange(-2, side + 2, device=logits.device)  # those at the border are repeated
    padded = F.pad(logits, (2, 2, 2, 2), mode="replicate")
    weights, is_outside = [], []
    for axis, length in enumerate(lengths):
        index, ends = torch.arange(length, device=logits.device), pixels[:, axis, None]
        d = (((index + 0.5) * (side / ends) - 0.5)[..., None] - cells).abs()
        near, far = (1.25 * d - 2.25) * d * d + 1, ((3.75 - 0.75 * d) * d - 6) * d + 3
        weights.append(torch.where(d <= 1, near, far.where(d < 2, 0.0)))  # torch's bicubic kernel
        is_outside.append(index >= ends)
    found = []
    for k in range(logits.shape[1]):
        values = weights[1] @ padded[:, k] @ weights[0].transpose(1, 2)
        values = values.masked_fill(is_outside[0][:, None], -torch.inf)
        values = values.masked_fill(is_outside[1][..., None], -torch.inf)
        values, x = values.max(dim=2)
        highest, y = values.max(dim=1)
        places = torch.stack([x.gather(1, y[:, None])[:, 0], y], dim=1)
        places = (places + 0.5) * (sizes / pixels) + boxes[:, :2]
        scores = 1 / (logits[:, k] - highest[:, None, None]).exp().sum(dim=(1, 2))
        found.append(torch.cat([places, scores[:, None]], dim=1))
    return torch.stack(found, dim=1)


def decode_at_once(logits: Tensor, boxes: Tensor) -> Tensor:
    """`decode_keypoints` for GPUs: few kernels of fixed shapes, whatever the maps and boxes."""
    if not len(logits):
        return logits.new_zeros(*logits.shape[:2], 3)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sizes.ceil()
    places, highest = highest_pixels(logits, pixels)
    places = (places + 0.5) * (sizes / pixels)[:, None] + boxes[:, None, :2]
    exps = (logits - highest[..., None, None]).clamp_(min=-NEGLIGIBLE).exp_()
    scores = 1 / exps.sum(dim=(2, 3))
    return torch.cat([places, scores[..., None]], dim=2)


def decode_by_need(logits: Tensor, boxes: Tensor) -> Tensor:
    """`decode_keypoints` for CPUs: no more arithmetic than the maps and boxes need."""
    points = logits.new_zeros(*logits.shape[:2], 3)
    is_clear = torch.zeros_like(points[..., 0], dtype=torch.bool)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sizes.ceil()
    # Maps that shrink are resized whole below; the others are searched with those of like size.
    by_size = pixels.amax(dim=1).argsort()
    by_size = by_size[(pixels.prod(dim=1) > logits.shape[2] * logits.shape[3])[by_size]]
    for start in range(0, len(by_size), ROIS_AT_ONCE):
        rois = by_size[start : start + ROIS_AT_ONCE]
        maps, shape = logits[rois].flatten(0, 1), is_clear[rois].shape
        found, clear = _highest_pixels(maps, pixels[rois].repeat_interleave(shape[1], dim=0))
        points[rois], is_clear[rois] = found.view(*shape, 3), clear.view(shape)
    points[..., :2] = (points[..., :2] + 0.5) * (sizes / pixels)[:, None] + boxes[:, None, :2]
    # Where rounding decides, as on a flat map, it has to be detectron2's.
    for r in (~is_clear).any(dim=1).nonzero().flatten().tolist():
        # Columns of the answer: x, y, logit, score.
        theirs = heatmaps_to_keypoints(logits[r, ~is_clear[r]][None], boxes[r][None])
        points[r, ~is_clear[r]] = theirs[0, :, [0, 1, 3]]
    return points


def _highest_pixels(maps: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The highest pixel of each of N maps after bicubic resizing.

    Args:
        maps: float32 (N, M, M).
        sizes: float32 (N, 2): width and height each is resized to, pixels.

    Returns:
        float32 (N, 3): x and y of that pixel, counted from 0, and its score, where it is clear.
        bool (N,): whether it is clear, all others being lower by more than rounding.
    """
    num_maps, side = maps.shape[:2]
    offsets = torch.arange(math.ceil(sizes.max() / side) + 1, device=maps.device)
    # Patch (i, j) is up and left of the centre of cell (i, j). Cells beyond the border repeat it.
    padded = F.pad(maps[None], (2, 2, 2, 2), mode="replicate")[0]
    patches = padded.unfold(1, 4, 1).unfold(2, 4, 1)  # (N, M + 1, M + 1, 4, 4), a view

    # Known: the highest pixel of the patch of the one nearest to the highest cell.
    cell = maps.flatten(1).argmax(dim=1)
    cells = torch.stack([cell % side, cell // side], dim=1)
    nearest = ((cells + 0.5) * sizes / side).floor().minimum(sizes - 1)
    at = _locate(nearest, side / sizes)[0]
    near = patches[torch.arange(num_maps, device=maps.device), at[:, 1], at[:, 0]]
    known = _resize(control_points(near.double()), at, side / sizes, sizes, offsets)[1]
    known = known.amax(dim=(1, 2)) - _rounding(near, side) - _rounding(maps, side)

    # The control points of a patch are next to its corners.
    bound = bound_control_points(padded)
    may_exceed = F.pad(bound >= known.float()[:, None, None], (1, 1, 1, 1))
    may_exceed = may_exceed[:, 1:] | may_exceed[:, :-1]
    may_exceed = may_exceed[..., 1:] | may_exceed[..., :-1]
    may_exceed[may_exceed.sum(dim=(1, 2)) > MAX_PATCHES] = False
    k, i, j = may_exceed.nonzero().unbind(dim=1)
    left = patches[k, i, j]
    control = control_points(left.double())  # which neither autocast nor TF32 touches
    kept = (control.amax(dim=(1, 2)) >= known[k]).nonzero().flatten()
    k, at, left, control = k[kept], torch.stack([j, i], dim=1)[kept], left[kept], control[kept]

    pixels, values = _resize(control, at, (side / sizes)[k], sizes[k], offsets)
    rounding = _rounding(left, side)
    highest = torch.full_like(known, -torch.inf)
    highest.scatter_reduce_(0, k, values.amax(dim=(1, 2)) - rounding, "amax")
    patch, row, column = (values >= (highest[k] - rounding)[:, None, None]).nonzero().unbind(dim=1)
    k = k[patch]
    points = maps.new_zeros(num_maps, 3)
    points[k, 0], points[k, 1] = pixels[patch, 0, column], pixels[patch, 1, row]
    points[k, 2] = values[patch, row, column].float()
    exps = (maps - points[:, 2, None, None]).clamp_(min=-NEGLIGIBLE).exp_()
    points[:, 2] = 1 / exps.sum(dim=(1, 2))
    return points, k.bincount(minlength=num_maps) == 1


def _rounding(cells: Tensor, side: int) -> Tensor:
    """How far two float32 resizings of each of (P, n, n) cells may be apart.

    Positions, up to M, are rounded too, which counts where the cells differ. What is elsewhere on
    the map, such as a tail of -300 beside a peak of 8, does not.
    """
    low, high = cells.amin(dim=(1, 2)), cells.amax(dim=(1, 2))
    return torch.finfo(torch.float32).eps * (side * (high - low) + 4 * high.maximum(-low))


def _locate(pixels: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The patches that pixels, `steps` cells wide, lie in, and where in [0, 1) of its side."""
    positions = (pixels + 0.5) * steps - 0.5
    below = positions.floor()
    return below.long() + 1, positions - below


def _resize(
    control: Tensor, at: Tensor, steps: Tensor, sizes: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The pixels of P patches `at` (P, 2): float32 (P, 2, n) x and y, n offsets being what the
    largest may have, and float64 (P, n, n) values, -inf where a pixel is not the patch's."""
    at, steps, sizes = at[..., None], steps[..., None], sizes[..., None]
    pixels = ((at - 0.5) / steps - 0.5).floor() + offsets
    owners, t = _locate(pixels, steps)
    is_own = (owners == at) & (pixels >= 0) & (pixels < sizes)
    s, t = 1 - t.double(), t.double()
    x, y = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=3).unbind(dim=1)
    values = y @ control @ x.mT
    return pixels, values.masked_fill_(~(is_own[:, 1, :, None] & is_own[:, 0, None]), -torch.inf)
