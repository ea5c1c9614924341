"""Proposals of a trained RPN as files that detectron2 trains and tests on."""

import copy
import logging
import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.structures import BoxMode
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.config.device import device_of

logger = logging.getLogger(__name__)

# Of the training and of the test datasets, in the order of `dataset.train.names` and
# `dataset.test.names`.
ProposalFiles = tuple[list[str], list[str]]


class ProposalWriter(DatasetEvaluator):
    """Collects the proposals of a dataset, from all processes, and writes detectron2's file.

    The file is a pickled dict of lists over the images: "ids"; "boxes", float32 (R, 4) XYXY in
    pixels of the image on disk; "objectness_logits", float32 (R,), descending. It appears whole or
    not at all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def reset(self) -> None:
        self._proposals: list[tuple[Any, Any, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            proposals = output["proposals"]
            boxes = proposals.proposal_boxes.tensor.float().cpu().numpy()
            logits = proposals.objectness_logits.float().cpu().numpy()
            self._proposals.append((image["image_id"], boxes, logits))

    def evaluate(self) -> None:
        gathered = comm.gather(self._proposals)
        if comm.is_main_process():
            ids, boxes, logits = zip(*chain.from_iterable(gathered))
            content = {
                "ids": list(ids),
                "boxes": list(boxes),
                "objectness_logits": list(logits),
                "bbox_mode": BoxMode.XYXY_ABS.value,
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as file:
                pickle.dump(content, file, protocol=pickle.HIGHEST_PROTOCOL)
        comm.synchronize()  # the next stage reads it in every process


def write_proposals(cfg: DictConfig) -> ProposalFiles:
    """Write what a trained RPN proposes on each of its training and test datasets.

    An image, resized as for testing, gets as many proposals as the row's RPN would hand over in
    training on the training sets, in testing on the test set. Images without annotations have
    proposals too: detectron2 looks for those of every image, and leaves images out afterwards.

    Args:
        cfg: from `rpn_stage`, its training finished. Files go to `proposals/` in its
            `train.output_dir`; one that rank 0 finds there is left as it is.
    """
    output = Path(cfg.train.output_dir)
    files: ProposalFiles = ([], [])
    for i, split in enumerate(("train", "test")):
        model: nn.Module | None = None
        for n, name in enumerate(cfg.dataset[split].names):
            path = output / "proposals" / f"{split}_{n}.pkl"
            files[i].append(str(path))
            if comm.all_gather(path.is_file())[0]:
                logger.info("%s: there already, proposals on %s", path, name)
                continue
            logger.info("%s: writing proposals on %s", path, name)
            if model is None:
                model = instantiate(_with_topk(cfg.model, i)).to(device_of(cfg))
                checkpoint = torch.load(output / "model_final.pth", "cpu", weights_only=True)
                model.load_state_dict(checkpoint["model"])
            loader = copy.deepcopy(cfg.dataloader.test)
            loader.dataset = L(get_detection_dataset_dicts)(names=[name], filter_empty=False)
            inference_on_dataset(model, instantiate(loader), ProposalWriter(path))
    return files


def _with_topk(model: DictConfig, index: int) -> DictConfig:
    """A model that keeps as many proposals in inference as in training (0) or in testing (1)."""
    model = copy.deepcopy(model)
    rpn = model.proposal_generator
    for key in ("pre_nms_topk", "post_nms_topk"):
        rpn[key] = (rpn[key][index],) * 2
    return model
