"""Which proposals the RoI heads train on (Sec. 3.1), chosen without waiting for each image."""

from typing import Any

import numpy as np
import torch
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Instances, PolygonMasks
from detectron2.utils.events import get_event_storage
from torch.nn.utils.rnn import pad_sequence

from mask_rcnn_plugin.fast.matching import match, sample


class SampledProposals(list[Instances]):
    """The proposals sampled of each image, positives first; the host knows how many these are."""

    def __init__(self, instances: list[Instances], num_foreground: list[int]) -> None:
        super().__init__(instances)
        self.num_foreground = num_foreground


def foreground(proposals: list[Instances], num_classes: int) -> list[Instances]:
    """The positives of each image, as detectron2's `select_foreground_proposals` finds them."""
    if isinstance(proposals, SampledProposals):
        return [p[:n] for p, n in zip(proposals, proposals.num_foreground)]
    return select_foreground_proposals(proposals, num_classes)[0]


class ProposalSampling(ROIHeads):
    """detectron2's `label_and_sample_proposals` for all images at once, and one wait for them.

    The proposals are other random ones, of the same distribution, positives first.
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
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        counts = [len(p) for p in proposals]
        boxes = pad_sequence([p.proposal_boxes.tensor for p in proposals], batch_first=True)
        matcher = self.proposal_matcher
        matches, labels = match(
            [t.gt_boxes.tensor for t in targets],
            boxes,
            matcher.thresholds[1:-1],
            matcher.labels,
            matcher.allow_low_quality_matches,
        )
        for label, count in zip(labels, counts):
            if count < len(label):
                label[count:] = -1
        sampled = sample(
            labels == 1, labels == 0, self.batch_size_per_image, self.positive_fraction
        )
        indices, is_positive, is_there = sampled
        matches = matches.gather(1, indices)
        num_classes = matches.new_full((1,), self.num_classes)  # of an image without objects
        gt_classes = pad_sequence([*(t.gt_classes for t in targets), num_classes], batch_first=True)
        classes = gt_classes[:-1].gather(1, matches).where(is_positive, self.num_classes)
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
