"""detectron2's box predictor, without its waits for the device."""

import torch
from detectron2.layers import cat, cross_entropy
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from mask_rcnn_plugin.fast.box_regression import box_regression_loss
from mask_rcnn_plugin.fast.grouping import owners
from mask_rcnn_plugin.fast.proposals import BOXES_AT_ONCE, clip, limits, top_detections
from mask_rcnn_plugin.fast.replacement import renamed
from mask_rcnn_plugin.modeling.rpn import statistics_are_due


class MaskRCNNBoxPredictor(FastRCNNOutputLayers):
    """detectron2's `FastRCNNOutputLayers`, all images of a batch together.

    Losses and detections are detectron2's, to rounding. Statistics (`fast_rcnn/cls_accuracy`, ...)
    are put every 20th iteration.

    Arguments are those of `FastRCNNOutputLayers`.
    """

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: (R, K + 1) logits, background last, and (R, 4 * K or 4) deltas.
            proposals: of each image, with `proposal_boxes`, `gt_boxes` and `gt_classes`, in [0, K];
                K is background.

        Returns:
            {"loss_cls": scalar, "loss_box_reg": scalar}.
        """
        if not proposals:
            return super().losses(predictions, proposals)
        scores, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # Without ground truth all are background, whose boxes don't matter.
        gt_boxes = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        if len(gt_classes) and statistics_are_due():
            _put_statistics(scores, gt_classes)
        if self.use_sigmoid_ce:
            loss_cls = self.sigmoid_cross_entropy_loss(scores, gt_classes)
        else:
            loss_cls = cross_entropy(scores, gt_classes, reduction="mean")
        loss_box_reg = self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes)
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
        return {k: v * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """
        Args:
            proposal_boxes, gt_boxes: (R, 4).
            pred_deltas: (R, 4 * K) or (R, 4).
            gt_classes: int64 (R,).

        Returns:
            Scalar: the sum over the foreground, divided by R (Fast R-CNN).
        """
        is_foreground = (gt_classes >= 0) & (gt_classes < self.num_classes)
        if pred_deltas.shape[1] != 4:
            classes = gt_classes.clamp(0, self.num_classes - 1)[:, None, None].expand(-1, 1, 4)
            pred_deltas = pred_deltas.view(-1, self.num_classes, 4).gather(1, classes)[:, 0]
        loss = box_regression_loss(
            pred_deltas,
            proposal_boxes,
            gt_boxes,
            is_foreground,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return loss / max(len(gt_classes), 1)

    _stock_inference = renamed(FastRCNNOutputLayers.inference, "_stock_inference")

    def inference(  # type: ignore[no-untyped-def]
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ):
        """
        Args:
            predictions: as those of `losses`.
            proposals: of each image, with `proposal_boxes`.

        Returns:
            For each image `pred_boxes`, `scores` and `pred_classes` of the detections, descending.
            For each image, int64: which of its proposals they are of.
        """
        # A trace would fix the numbers of boxes.
        if torch.jit.is_scripting() or torch.jit.is_tracing() or len(proposals) == 0:
            return self._stock_inference(predictions, proposals)
        return self._top_detections(predictions, proposals)

    @torch.jit.unused
    def _top_detections(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        if type(self).predict_boxes is not FastRCNNOutputLayers.predict_boxes:
            return self._stock_inference(predictions, proposals)
        counts = [len(p) for p in proposals]
        sizes = [p.image_size for p in proposals]
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        deltas = predictions[1].unflatten(1, (-1, 4))
        scores = torch.cat(list(self.predict_probs(predictions, proposals)))
        is_finite = torch.cat([predictions[1], scores, boxes], dim=1).isfinite().all(dim=1)
        candidates = (scores[:, :-1] > self.test_score_thresh) & is_finite[:, None]
        rows, classes = candidates.nonzero().unbind(dim=1)
        if len(counts) > 1 and len(rows) > BOXES_AT_ONCE:  # too many for one NMS
            return self._stock_inference(predictions, proposals)
        # Decoded after the choice: not the boxes of every class.
        deltas = deltas[rows, classes if deltas.shape[1] > 1 else torch.zeros_like(classes)]
        images = owners(counts, boxes)[rows]
        found = self.box2box_transform.apply_deltas(deltas, boxes[rows])
        found = clip(found, limits(sizes, found)[images])
        scores = scores[rows, classes]
        kept = top_detections(
            found,
            scores,
            classes,
            images,
            len(counts),
            self.num_classes,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        results, indices, start = [], [], 0
        for size, count, keep in zip(sizes, counts, kept):
            results.append(
                Instances(
                    size,
                    pred_boxes=Boxes(found[keep]),
                    scores=scores[keep],
                    pred_classes=classes[keep],
                )
            )
            indices.append(rows[keep] - start)
            start += count
        return results, indices


def _put_statistics(scores: Tensor, gt_classes: Tensor) -> None:
    """detectron2's, of (R, K + 1) logits: accuracies, and how much is called background."""
    pred_classes, background = scores.argmax(dim=1), scores.shape[1] - 1
    is_right, is_foreground = pred_classes == gt_classes, gt_classes < background
    is_missed = is_foreground & (pred_classes == background)
    sums = torch.stack([is_right, is_foreground, is_right & is_foreground, is_missed]).sum(dim=1)
    right, foreground, foreground_right, missed = sums.tolist()
    storage = get_event_storage()
    storage.put_scalar("fast_rcnn/cls_accuracy", right / len(gt_classes))
    if foreground:
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", foreground_right / foreground)
        storage.put_scalar("fast_rcnn/false_negative", missed / foreground)
