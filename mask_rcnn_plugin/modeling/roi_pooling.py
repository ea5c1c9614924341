"""RoIPool, RoIWarp and RoIAlign (Sec. 3, Tables 2c, 2d and 6) behind one multi-level pooler.

| layer    | RoI boundary                | bin boundary | samples                 | aggregation |
|----------|-----------------------------|--------------|-------------------------|-------------|
| RoIPool  | rounded to the feature grid | rounded      | every cell of a bin     | max         |
| RoIWarp  | rounded to the feature grid | exact        | regular points, bilinear| max, ave    |
| RoIAlign | exact                       | exact        | regular points, bilinear| max, ave    |

All of them are built from torchvision's operators and `roi_align`, so they run and have gradients
(to the features) wherever those do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import roi_align as torchvision_roi_align
from torchvision.ops import roi_pool

from mask_rcnn_plugin.fast.grouping import grouped, owners
from mask_rcnn_plugin.fast.roi_align import roi_align
from mask_rcnn_plugin.modeling.choices import ROI_LAYER_REGISTRY, chosen

Aggregation = Literal["ave", "max"]
AGGREGATIONS = get_args(Aggregation)


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}, must be one of {AGGREGATIONS}")


def _sampling_dtype(features: Tensor) -> torch.dtype:
    """float32, or float64 if the features are: box coordinates in half precision would be off by
    whole pixels."""
    return torch.promote_types(features.dtype, torch.float32)


class RoIPool(torchvision.ops.RoIPool):
    """RoIPool (Fast R-CNN): the maximum over the feature cells of each bin, everything rounded.

    Args:
        output_size: (rows, columns) of bins.
        spatial_scale: feature cells per image pixel, e.g. 1/16.
        sampling_ratio, aggregation: of other layers; this one has no points and takes the max.
    """

    def __init__(
        self,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        *,
        aggregation: Aggregation = "max",
    ) -> None:
        super().__init__(output_size, spatial_scale)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """As `RoIAlign.forward`."""
        dtype = _sampling_dtype(features)
        pooled = roi_pool(features.to(dtype), rois.to(dtype), self.output_size, self.spatial_scale)
        return pooled.to(features.dtype)


class RoIAlign(ROIAlign):
    """RoIAlign: bilinear samples at exact positions; nothing is rounded (Sec. 3).

    detectron2's `ROIAlign`, with the maximum as well, and faster on a CPU. Each bin is sampled at
    `sampling_ratio` x `sampling_ratio` regularly placed points. The paper uses 4 points a bin,
    sampling_ratio=2.

    Args:
        output_size: (rows, columns) of bins.
        spatial_scale: feature cells per image pixel, e.g. 1/16.
        sampling_ratio: points a bin and direction. 0 takes ceil(RoI size / bins)
            for each RoI; only with "ave".
        aligned: half-pixel convention. False gives the first released version, which samples half
            a feature cell off.
        aggregation: "ave" or "max" over a bin's points. The paper finds no difference (Table 2c).

    Raises:
        ValueError: on an unknown aggregation, or "max" with sampling_ratio=0.
    """

    def __init__(
        self,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 2,
        aligned: bool = True,
        *,
        aggregation: Aggregation = "ave",
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, aligned)
        _check_aggregation(aggregation)
        if sampling_ratio < 0 or (sampling_ratio == 0 and aggregation == "max"):
            raise ValueError(
                f"sampling_ratio is {sampling_ratio} with aggregation {aggregation!r}: must be "
                ">= 1, or 0 (adaptive) with 'ave'"
            )
        self.aggregation = aggregation

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Pool each RoI.

        Args:
            features: (N, C, H, W).
            rois: (R, 5): image index, then a box in image pixels.

        Returns:
            (R, C, rows, columns), dtype of `features`.
        """
        rois = self.place(rois.to(_sampling_dtype(features)))
        if self.aggregation == "ave":
            return self._sample(features, rois, self.output_size, self.sampling_ratio)
        # A grid of s times finer bins with one sample each has its samples at the very points
        # where `s` samples a bin would be, so that a max-pool over it is the max over a bin.
        s = self.sampling_ratio
        fine = (self.output_size[0] * s, self.output_size[1] * s)
        return F.max_pool2d(self._sample(features, rois, fine, 1), s)

    def place(self, rois: Tensor) -> Tensor:
        """The RoIs that are sampled: (R, 5), as they are."""
        return rois

    def _sample(self, features: Tensor, rois: Tensor, bins: tuple[int, int], points: int) -> Tensor:
        """The means of points x points samples in each bin."""
        x, scale, aligned = features, self.spatial_scale, self.aligned
        if torch.jit.is_scripting():
            pooled = torchvision_roi_align(x.to(rois.dtype), rois, bins, scale, points, aligned)
        else:
            # On a CPU a bin sums few cells, in any precision; a gradient would sum many bins.
            if x.is_cuda or x.requires_grad or torch.jit.is_tracing():
                x = x.to(rois.dtype)
            pooled = roi_align(x, rois, bins, scale, points, aligned)
        return pooled.to(features.dtype)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, aggregation={self.aggregation!r})"


class RoIWarp(RoIAlign):
    """RoIWarp (MNC; Table 2c): RoIAlign of an RoI whose corners are rounded to the feature grid.

    Bilinear sampling without alignment: the corners x * spatial_scale are rounded to whole feature
    cells and the rounded RoI is read in RoIPool's frame, where an integer is the centre of a cell.
    An RoI thinner than one cell is widened to one, as RoIPool does.
    """

    def __init__(
        self,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 2,
        *,
        aggregation: Aggregation = "ave",
    ) -> None:
        super().__init__(
            output_size, spatial_scale, sampling_ratio, aligned=False, aggregation=aggregation
        )

    def place(self, rois: Tensor) -> Tensor:
        """The RoIs that are sampled: (R, 5), with corners on the feature grid."""
        # floor(x + 0.5) rounds halves up, as RoIPool's C++ does inside an image; torch.round rounds
        # them to even.
        corners = torch.floor(rois[:, 1:] * self.spatial_scale + 0.5) / self.spatial_scale
        return torch.cat([rois[:, :1], corners], dim=1)


# detectron2's own names keep detectron2's meaning, so that an existing YAML file can change its
# heads and nothing else. Its "ROIAlign" is the first version, half a feature cell off.
POOLER_TYPES: dict[str, Callable[..., nn.Module]] = {
    "RoIAlign": RoIAlign,
    "RoIWarp": RoIWarp,
    "RoIPool": RoIPool,
    "ROIAlignV2": RoIAlign,
    "ROIAlign": partial(RoIAlign, aligned=False),
    "ROIPool": RoIPool,
}


def find_roi_layer(
    pooler_type: str | Callable[..., nn.Module], key: str = "pooler_type"
) -> Callable[..., nn.Module]:
    """What makes the RoI layers of a type.

    Args:
        pooler_type: a name of `POOLER_TYPES` or in `ROI_LAYER_REGISTRY`, a class's full name, or
            the class.
        key: that it stands under, for the message.

    Raises:
        ValueError: on any other.
    """
    return chosen(key, pooler_type, POOLER_TYPES, ROI_LAYER_REGISTRY)


class RoIPooler(ROIPooler):
    """detectron2's multi-level pooler with the paper's RoI layers on each level.

    It is called as detectron2's, and takes detectron2's arguments. Levels are assigned as in FPN:
    an RoI of canonical_box_size pixels (square root of its area) reads level canonical_level, one
    of half the size the level below.

    Args:
        output_size: P, side of the pooled feature in bins.
        scales: feature cells per image pixel of each level, finest first, each half of the one
            before, e.g. (1/4, 1/8, 1/16, 1/32); a single one for C4 and C5.
        sampling_ratio, aggregation: see `RoIAlign`; RoIPool has no points and takes the max.
        pooler_type: see `find_roi_layer`. A layer of your own is made as
            layer(output_size, spatial_scale, sampling_ratio, aggregation=aggregation).
        canonical_box_size, canonical_level: see above.

    Raises:
        ValueError: on an unknown type or aggregation.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        sampling_ratio: int = 2,
        pooler_type: str | Callable[..., nn.Module] = "RoIAlign",
        canonical_box_size: int = 224,
        canonical_level: int = 4,
        *,
        aggregation: Aggregation = "ave",
    ) -> None:
        super().__init__(
            output_size, scales, sampling_ratio, "ROIAlignV2", canonical_box_size, canonical_level
        )
        _check_aggregation(aggregation)
        layer = find_roi_layer(pooler_type)
        self.level_poolers = nn.ModuleList(
            layer(self.output_size, scale, sampling_ratio, aggregation=aggregation)
            for scale in scales
        )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool the boxes of each image from their levels.

        Args:
            x: a feature map (N, C, H, W) for each scale.
            box_lists: boxes in pixels of the network's input, one `Boxes` an image.

        Returns:
            (R, C, P, P) of all boxes in their order, channels-last if the features are.

        Raises:
            ValueError: if there are not as many feature maps as scales, or boxes as images.
        """
        if torch.jit.is_tracing():  # would fix the layout and the numbers of boxes
            return super().forward(x, box_lists)
        if len(x) != len(self.level_poolers) or len(box_lists) != len(x[0]):
            raise ValueError(
                f"{len(x)} feature maps and boxes of {len(box_lists)} images are given, must be "
                f"{len(self.level_poolers)} and {len(x[0])}: a map for each scale, boxes for each "
                "image of the batch"
            )
        if not box_lists:
            return x[0].new_zeros(0, x[0].shape[1], *self.output_size)
        layout = torch.contiguous_format
        if x[0].is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        boxes = torch.cat([boxes.tensor for boxes in box_lists])
        images = owners([len(boxes) for boxes in box_lists], boxes).to(boxes.dtype)
        rois = torch.cat([images[:, None], boxes], dim=1)
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois).contiguous(memory_format=layout)
        levels = assign_boxes_to_levels(
            [Boxes(boxes)],
            self.min_level,
            self.max_level,
            self.canonical_box_size,
            self.canonical_level,
        ).clamp(0, len(x) - 1)  # a box that is no number has no level
        order, counts = grouped(levels, len(x))
        of_levels = zip(self.level_poolers, x, rois[order].split(counts))
        parts = (pooler(features, of_level) for pooler, features, of_level in of_levels)
        shape = (len(rois), x[0].shape[1], *self.output_size)
        pooled = torch.empty(shape, dtype=x[0].dtype, device=x[0].device, memory_format=layout)
        if any(features.requires_grad for features in x):  # of one write it is one read
            return pooled.index_put_((order,), torch.cat(list(parts)))
        for rows, part in zip(order.split(counts), parts):
            pooled.index_put_((rows,), part)
        return pooled

    def __prepare_scriptable__(self) -> ROIPooler:
        """What `torch.jit.script` compiles in its place: detectron2's, on this one's layers."""
        scales = [2.0**-level for level in range(self.min_level, self.max_level + 1)]
        stock = ROIPooler(
            self.output_size, scales, 0, "ROIAlignV2", self.canonical_box_size, self.canonical_level
        )
        stock.level_poolers = self.level_poolers
        return stock
