"""The best boxes of each image after NMS, for all images at once.

As detectron2's `find_top_rpn_proposals` and `fast_rcnn_inference`, which go from image to image and
wait for the device several times at each: here it is once for the NMS of all images and once for
the numbers of boxes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, nms

from mask_rcnn_plugin.fast.grouping import grouped, owners

# Boxes of one NMS call. With more, torchvision waits at each group of them on CUDA.
BOXES_AT_ONCE = 25_000


def limits(image_sizes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Where boxes end: (N, 4), width and height twice, of N images of (height, width)."""
    ends = like.new_empty(len(image_sizes), 4)
    for end, (height, width) in zip(ends, image_sizes):
        end[0::2].fill_(width)
        end[1::2].fill_(height)
    return ends


def clip(boxes: Tensor, ends: Tensor) -> Tensor:
    """Boxes inside their images."""
    return torch.minimum(boxes.clamp(min=0), ends)


def nms_in_groups(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """torchvision's `batched_nms` of boxes that begin at 0, which `torch.export` can follow."""
    if not torch.compiler.is_compiling():
        return batched_nms(boxes, scores, groups, threshold)
    # Its way for few boxes, without asking how many there are. torchvision tells the exporter that
    # two or more are left: hence two that nothing overlaps.
    num_boxes = boxes.shape[0]
    boxes, scores = F.pad(boxes, (0, 0, 0, 2)), F.pad(scores, (0, 2), value=-torch.inf)
    boxes = boxes + (F.pad(groups, (0, 2)) * (boxes.max() + 1))[:, None]
    kept = nms(boxes, scores, threshold)
    return kept[kept < num_boxes]


def top_proposals(
    logits: Tensor,
    boxes: Tensor,
    num_of_level: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    nms_threshold: float,
    most: int,
    min_size: float,
) -> tuple[Tensor, Tensor, list[int], bool]:
    """NMS within each level of each image, then the highest of all levels.

    Args:
        logits: (N, K), objectness.
        boxes: float32 (N, K, 4), XYXY in pixels of the network's input.
        num_of_level: how many of the K boxes are of each level, in order.
        image_sizes: (height, width) of each image; boxes are clipped to it.
        nms_threshold: IoU from which the lower of two boxes is left out.
        most: P, boxes that an image keeps.
        min_size: boxes whose width or height is not above it are left out; pixels.

    Returns:
        (N, P) logits, descending, and (N, P, 4) boxes; P is smaller if K is.
        How many of them there are of each image; the others are padding.
        Whether all logits and boxes were finite; those that are not are left out.
    """
    num_images, num_boxes = logits.shape
    is_finite = boxes.isfinite().all(dim=2) & logits.isfinite()
    boxes = clip(boxes, limits(image_sizes, boxes)[:, None])
    is_valid = is_finite & ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(dim=2)
    # What is left out overlaps nothing, and comes last.
    boxes = boxes.where(is_valid[..., None], 0.0)
    scores = logits.where(is_valid, -torch.inf)

    at_once = max(1, BOXES_AT_ONCE // max(1, num_boxes))
    kept = torch.zeros_like(is_valid)
    # Small numbers: torchvision shifts the boxes of a group by its number times the image's size.
    images = torch.arange(num_images, device=boxes.device)[:, None] % at_once
    groups = images * len(num_of_level) + owners(num_of_level, boxes)
    for n in range(0, num_images, at_once):
        box, score, group = (x[n : n + at_once].flatten(0, 1) for x in (boxes, scores, groups))
        keep = nms_in_groups(box, score, group, nms_threshold)
        kept[n : n + at_once].view(-1).index_fill_(0, keep, True)
    scores, indices = scores.where(kept, -torch.inf).topk(min(most, num_boxes), dim=1)
    found = torch.cat([(scores > -torch.inf).sum(dim=1), is_finite.all()[None]]).tolist()
    boxes = boxes.gather(1, indices[..., None].expand(-1, -1, 4))
    return scores, boxes, found[:-1], found[-1]


def top_detections(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    images: Tensor,
    num_images: int,
    num_classes: int,
    nms_threshold: float,
    most: int,
) -> list[Tensor]:
    """NMS within each class of each image, then the highest of all classes.

    Args:
        boxes: float32 (T, 4), of all images together.
        scores, classes, images: (T,).
        num_images, num_classes: how many there can be.
        nms_threshold: IoU from which the lower of two boxes is left out.
        most: that an image keeps; negative for all.

    Returns:
        For each image, which of the T it keeps, by descending score.
    """
    if num_images > 1:  # so many groups are shifted so far that float32 would round to pixels
        boxes, scores = boxes.double(), scores.double()
    keep = nms_in_groups(boxes, scores, images * num_classes + classes, nms_threshold)
    order, counts = grouped(images[keep], num_images)
    of_images = keep[order].split(counts)
    return [of_image[:most] if most >= 0 else of_image for of_image in of_images]
