"""The configs of the stages: a row's own, without the part that the stage does not train."""

import copy
from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ProposalNetwork
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mask_rcnn_plugin.config.check import NODES, SOURCE
from train_stages.proposals import ProposalFiles


def rpn_stage(cfg: DictConfig, stage: str) -> DictConfig:
    """The row's backbone and RPN as detectron2's `ProposalNetwork`, on the row's schedule.

    Evaluated is the average recall of the boxes.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`; not changed.
        stage: name of the stage's folder in `train.output_dir`.
    """
    cfg = _stage(cfg, stage)
    row = cfg.model
    cfg.model = L(ProposalNetwork)(
        backbone=row.backbone,
        proposal_generator=row.proposal_generator,
        pixel_mean=row.pixel_mean,
        pixel_std=row.pixel_std,
    )
    cfg.dataloader.evaluator.tasks = ["box_proposals"]
    cfg.train.best_metric = cfg.train.early_stopping = None  # which name metrics of the row's tasks
    cfg.dataloader.evaluator.output_dir = None  # gigabytes of boxes, at each evaluation
    return cfg


def detector_stage(cfg: DictConfig, stage: str, proposals: ProposalFiles) -> DictConfig:
    """The row's model without its RPN, trained and tested on the files of `write_proposals`."""
    cfg = _stage(cfg, stage)
    topk = cfg.model.proposal_generator.post_nms_topk
    cfg.model.proposal_generator = None  # what detectron2's "PrecomputedProposals" stands for
    loaders = (cfg.dataloader.train, cfg.dataloader.test)
    for loader, files, number in zip(loaders, proposals, topk):
        loader.dataset.proposal_files = files
        loader.mapper.precomputed_proposal_topk = number
    return cfg


def fix_backbone(cfg: DictConfig, weights: Path) -> DictConfig:
    """A stage that starts from another one's checkpoint and keeps its backbone as it is."""
    cfg = copy.deepcopy(cfg)
    cfg.train.init_checkpoint = str(weights)
    cfg.model.backbone = L(fixed)(module=cfg.model.backbone)
    return cfg


def fixed(module: nn.Module) -> nn.Module:
    """Let nothing in a module change in training: neither parameters nor running statistics.

    Batch normalization becomes detectron2's frozen one, whose parameters are buffers under the same
    names, so that checkpoints fit.
    """
    for parameter in module.parameters():
        parameter.requires_grad = False
    return FrozenBatchNorm2d.convert_frozen_batchnorm(module)


def _stage(cfg: DictConfig, stage: str) -> DictConfig:
    """A copy with a folder of its own and without interpolations, so that nodes may be moved."""
    cfg = copy.deepcopy(cfg)
    cfg.train.output_dir = str(Path(cfg.train.output_dir) / stage)
    OmegaConf.resolve(cfg)
    used = {*NODES, SOURCE, *cfg[SOURCE].new_keys}
    for helper in [key for key in cfg if key not in used]:  # which nothing refers to any more
        del cfg[helper]
    return cfg
