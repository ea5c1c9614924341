"""detectron2's RPN, without its waits for the device."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import cat
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from mask_rcnn_plugin.fast.box_regression import box_regression_loss
from mask_rcnn_plugin.fast.grouping import padded
from mask_rcnn_plugin.fast.matching import match, sample
from mask_rcnn_plugin.fast.proposals import top_proposals
from mask_rcnn_plugin.fast.replacement import as_class, renamed

# Statistics are read from the device when detectron2's PeriodicWriter writes by default.
STATISTICS_PERIOD = 20


class SampledAnchors(NamedTuple):
    """S anchors of each image, as `sample` gives them, the P that may be positive first."""

    indices: Tensor  # (N, S)
    is_positive: Tensor
    is_there: Tensor
    boxes: Tensor  # (N, P, 4), of the first P


def statistics_are_due() -> bool:
    """Whether this iteration's statistics will be written."""
    return (get_event_storage().iter + 1) % STATISTICS_PERIOD == 0


def highest_anchors(logits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The highest of (N, A) logits, and which they are."""
    if not torch.compiler.is_compiling():
        return logits.topk(min(logits.shape[1], most), dim=1)
    # The same number for every image size; what is added is not finite, and so left out.
    highest, indices = F.pad(logits, (0, most), value=-torch.inf).topk(most, dim=1)
    return highest, indices.clamp(max=logits.shape[1] - 1)


@ANCHOR_GENERATOR_REGISTRY.register()
class MaskRCNNAnchorGenerator(DefaultAnchorGenerator):
    """detectron2's `DefaultAnchorGenerator`, the same anchors, made on the device."""

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[Tensor]:
        if torch.jit.is_tracing():  # would fix the sizes
            return super()._grid_anchors(grid_sizes)
        levels = []
        for size, stride, anchors in zip(grid_sizes, self.strides, self.cell_anchors):
            anchors = anchors.float()  # of a model in half precision, where positions are not
            y, x = (
                (torch.arange(n, dtype=anchors.dtype, device=anchors.device) + self.offset) * stride
                for n in size
            )
            grid = anchors.new_empty(*size, len(anchors), 4)
            grid[..., 0::2] = x[:, None, None] + anchors[:, 0::2]
            grid[..., 1::2] = y[:, None, None, None] + anchors[:, 1::2]
            levels.append(grid.view(-1, 4))
        return levels

    def __prepare_scriptable__(self) -> DefaultAnchorGenerator:
        """What `torch.jit.script` compiles in its place."""
        return as_class(self, DefaultAnchorGenerator)


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """The anchors of torchvision's R-CNNs, for their weights.

    Corners are rounded to whole pixels, and the strides of a level are its share of the image,
    padded, in whole pixels: 800 rows are 13 of the coarsest level, 61 pixels apart and not 64.

    Arguments are those of `DefaultAnchorGenerator`; `offset` is ignored, and only the first of
    `strides` is used.
    """

    def generate_cell_anchors(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().generate_cell_anchors(*args, **kwargs).round()

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[Tensor]:
        image = [n * self.strides[0] for n in grid_sizes[0]]
        cell_anchors: list[Tensor] = [x[1] for x in self.cell_anchors.named_buffers()]
        levels = []
        for size, anchors in zip(grid_sizes, cell_anchors):
            y = torch.arange(size[0], device=anchors.device) * (image[0] // size[0])
            x = torch.arange(size[1], device=anchors.device) * (image[1] // size[1])
            y, x = torch.meshgrid(y, x, indexing="ij")
            places = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
            levels.append((places + anchors).view(-1, 4))
        return levels


@PROPOSAL_GENERATOR_REGISTRY.register()
class MaskRCNNRPN(RPN):
    """detectron2's `RPN`, all images of a batch together and without waiting for the device.

    Losses and proposals are detectron2's, to rounding; a different random sample of anchors is
    drawn. Statistics (`rpn/num_pos_anchors`, ...) are put every 20th iteration. Where a subclass
    overrides a step of `RPN` that would be skipped, or has its own matcher, that part is
    detectron2's.

    Arguments are those of `RPN`.
    """

    @torch.jit.unused
    @torch.no_grad()
    def label_and_sample_anchors(  # type: ignore[no-untyped-def]
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ):
        """
        Args:
            anchors: of each level, A of all levels together.
            gt_instances: of N images, with `gt_boxes`.

        Returns:
            `SampledAnchors`.
            Ground truth of those that may be positive, the first P: (N, P, 4).
        """
        if (
            type(self).losses is not MaskRCNNRPN.losses
            or type(self)._subsample_labels is not RPN._subsample_labels
            or type(self.anchor_matcher) is not Matcher
        ):
            return super().label_and_sample_anchors(anchors, gt_instances)
        boxes = Boxes.cat(anchors)
        gt_boxes = padded([gt.gt_boxes.tensor for gt in gt_instances])
        counts = [len(gt) for gt in gt_instances]
        matches, labels = match(gt_boxes, counts, boxes.tensor[None], self.anchor_matcher)
        if self.anchor_boundary_thresh >= 0:
            for label, gt in zip(labels, gt_instances):
                label[~boxes.inside_box(gt.image_size, self.anchor_boundary_thresh)] = -1
        indices, is_positive, is_there = sample(
            labels == 1, labels == 0, self.batch_size_per_image, self.positive_fraction
        )
        positives = indices[:, : int(self.batch_size_per_image * self.positive_fraction)]
        matched = matches.gather(1, positives)[..., None].expand(-1, -1, 4)
        sampled = SampledAnchors(indices, is_positive, is_there, boxes.tensor[positives])
        return sampled, gt_boxes.gather(1, matched)

    @torch.jit.unused
    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: SampledAnchors,
        pred_anchor_deltas: list[Tensor],
        gt_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: of each level.
            pred_objectness_logits, pred_anchor_deltas: of each level, (N, its A) and (N, its A, 4).
            gt_labels, gt_boxes: from `label_and_sample_anchors`, this one's or `RPN`'s.

        Returns:
            {"loss_rpn_cls": scalar, "loss_rpn_loc": scalar}.
        """
        if not isinstance(gt_labels, SampledAnchors):
            return super().losses(
                anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
            )
        indices, is_positive, is_there, boxes = gt_labels
        num_images, num_positive = gt_boxes.shape[:2]
        if statistics_are_due():
            num_sampled = torch.stack([is_positive, is_there]).sum(dim=(1, 2)).tolist()
            storage = get_event_storage()
            storage.put_scalar("rpn/num_pos_anchors", num_sampled[0] / num_images)
            storage.put_scalar(
                "rpn/num_neg_anchors", (num_sampled[1] - num_sampled[0]) / num_images
            )

        logits = cat(pred_objectness_logits, dim=1).gather(1, indices)
        objectness_loss = F.binary_cross_entropy_with_logits(
            logits, is_positive.to(logits.dtype), is_there.to(logits.dtype), reduction="sum"
        )
        positives = indices[:, :num_positive]
        deltas = cat(pred_anchor_deltas, dim=1)
        localization_loss = box_regression_loss(
            deltas.gather(1, positives[..., None].expand(-1, -1, 4)).flatten(0, 1),
            boxes.flatten(0, 1),
            gt_boxes.flatten(0, 1),
            is_positive[:, :num_positive].flatten(),
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        normalizer = self.batch_size_per_image * num_images
        losses = {
            "loss_rpn_cls": objectness_loss / normalizer,
            "loss_rpn_loc": localization_loss / normalizer,
        }
        return {k: v * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    _stock_proposals = renamed(RPN.predict_proposals, "_stock_proposals")

    def predict_proposals(  # type: ignore[no-untyped-def]
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ):
        """
        Args:
            anchors, pred_objectness_logits, pred_anchor_deltas: as those of `losses`.
            image_sizes: (height, width) of each image.

        Returns:
            For each image `proposal_boxes`, at most `post_nms_topk`, and `objectness_logits`,
            descending.

        Raises:
            FloatingPointError: in training, if a logit or box is not finite.
        """
        # A trace would fix the numbers of boxes.
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            return self._stock_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        return self._top_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)

    @torch.jit.unused
    @torch.no_grad()
    def _top_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        if type(self)._decode_proposals is not RPN._decode_proposals:
            return self._stock_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        top: list[Any] = []
        for level, logits in enumerate(pred_objectness_logits):
            highest, indices = highest_anchors(logits, self.pre_nms_topk[self.training])
            deltas = pred_anchor_deltas[level].gather(1, indices[..., None].expand(-1, -1, 4))
            top.append((highest, deltas, anchors[level].tensor[indices]))
        logits, deltas, boxes = (cat(list(x), dim=1) for x in zip(*top))
        # Decoded after the choice: a few thousand boxes instead of all anchors.
        boxes = self.box2box_transform.apply_deltas(deltas.flatten(0, 1), boxes.flatten(0, 1))
        logits, boxes, counts, is_finite = top_proposals(
            logits,
            boxes.view(*logits.shape, 4),
            [highest.shape[1] for highest, *_ in top],
            image_sizes,
            self.nms_thresh,
            self.post_nms_topk[self.training],
            self.min_box_size,
        )
        if self.training and not is_finite:
            raise FloatingPointError(
                "Predicted boxes or scores contain Inf/NaN. Training has diverged."
            )
        return [
            Instances(
                size,
                proposal_boxes=Boxes(box.narrow(0, 0, n)),
                objectness_logits=logit.narrow(0, 0, n),
            )
            for size, box, logit, n in zip(image_sizes, boxes, logits, counts)
        ]
