"""Which proposals the RoI heads train on (Sec. 3.1), chosen without waiting for each image."""

from typing import Any

import numpy as np
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Instances, PolygonMasks
from detectron2.utils.events import get_event_storage

from mask_rcnn_plugin.fast.grouping import padded
from mask_rcnn_plugin.fast.matching import match, sample


class SampledProposals(list[Instances]):
    """The proposals sampled of each image, positives first; the host knows how many these are."""

    def __init__(self, instances: list[Instances], num_foreground: list[int]) -> None:
        super().__init__(instances)
        self.num_foreground = num_foreground


def foreground(proposals: list[Instances], num_classes: int) -> tuple[list[Instances], list[Any]]:
    """The positives of each image, as detectron2's `select_foreground_proposals` finds them, and
    which of its rows they are."""
    if isinstance(proposals, SampledProposals):
        rows = [slice(n) for n in proposals.num_foreground]
        return [p[of_image] for p, of_image in zip(proposals, rows)], rows
    return select_foreground_proposals(proposals, num_classes)


class ProposalSampling(ROIHeads):
    """detectron2's `label_and_sample_proposals` for all images at once, and one wait for them.

    It draws a different random sample of proposals, from the same distribution, positives first.
    detectron2's method is used where a subclass overrides `_sample_proposals` or has its own
    matcher.
    """

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        Args:
            proposals: of each image, with `proposal_boxes` and `objectness_logits`.
            targets: of each image, with `gt_boxes`, `gt_classes` and more `gt_` fields.

        Returns:
            For each image at most `batch_size_per_image` proposals, with `gt_classes` in [0, K],
            K being background, and, where there is ground truth, the `gt_` fields of the object
            each overlaps most with; those of the background mean nothing.
        """
        if (
            type(self)._sample_proposals is not ROIHeads._sample_proposals
            or type(self.proposal_matcher) is not Matcher
        ):
            return super().label_and_sample_proposals(proposals, targets)
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        boxes = padded([p.proposal_boxes.tensor for p in proposals])
        gt_boxes = padded([t.gt_boxes.tensor for t in targets])
        matches, labels = match(gt_boxes, [len(t) for t in targets], boxes, self.proposal_matcher)
        background, ignored = self.num_classes, -1
        classes = padded([t.gt_classes for t in targets], background).gather(1, matches)
        classes = classes.masked_fill(labels == 0, background).masked_fill(labels == -1, ignored)
        for of_image, its_proposals, target in zip(classes, proposals, targets):
            if not len(target):  # whatever the matcher says
                of_image.fill_(background)
            if len(its_proposals) < len(of_image):
                of_image[len(its_proposals) :] = ignored
        is_background = classes == background
        is_object = ~is_background & (classes != ignored)
        indices, is_positive, is_there = sample(
            is_object, is_background, self.batch_size_per_image, self.positive_fraction
        )
        matches, classes = matches.gather(1, indices), classes.gather(1, indices)
        # One transfer: which objects, and how many proposals, so that all else has known sizes.
        numbers = torch.stack([is_positive, is_there]).sum(dim=2)
        host = torch.cat([numbers.flatten(), matches.flatten()]).tolist()
        num_images = len(targets)
        num_positive, num_sampled = host[:num_images], host[num_images : 2 * num_images]
        objects = np.asarray(host[2 * num_images :]).reshape(num_images, -1)

        results = []
        for i, (of_image, target) in enumerate(zip(proposals, targets)):
            n = num_sampled[i]
            chosen = of_image[indices[i, :n]]
            chosen.gt_classes = classes[i, :n]
            if len(target):
                on_host, on_device = objects[i, :n].tolist(), matches[i, :n]
                for name, value in target.get_fields().items():
                    if name.startswith("gt_") and not chosen.has(name):
                        is_list: Any = isinstance(value, PolygonMasks)
                        chosen.set(name, value[on_host if is_list else on_device])
            results.append(chosen)

        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", np.mean(num_positive))
        storage.put_scalar(
            "roi_head/num_bg_samples", np.mean(np.subtract(num_sampled, num_positive))
        )
        return SampledProposals(results, num_positive)
