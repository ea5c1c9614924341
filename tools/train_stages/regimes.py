"""The paper's ways to train RPN and Mask R-CNN apart from each other (Sec. 3.1, 4.4).

Joint training, detectron2's way, is what every config does by itself. Here are

* "separate" (Sec. 3.1): an RPN that shares nothing with Mask R-CNN, and Mask R-CNN on its
  proposals;
* "4step" (Sec. 4.4, after Faster R-CNN): the two in turn, which ends in one model.

A stage is a config of its own, the row's with the part that the stage does not train left out, and
runs in a folder of its own below the row's `train.output_dir`.
"""

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ProposalNetwork
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.config import ConfigError, deciding
from mask_rcnn_plugin.evaluation.testing import evaluate
from mask_rcnn_plugin.training.checkpoint import SafeCheckpointer, write_checkpoint
from mask_rcnn_plugin.training.weights import WeightsError
from train import do_train
from train_stages.proposals import ProposalFiles, write_proposals

REGIMES = ("separate", "4step")
CHECKPOINT = "model_final.pth"
RECORD = "stages.json"

logger = logging.getLogger(__name__)


def rpn_stage(cfg: DictConfig, stage: str) -> DictConfig:
    """The row's backbone and RPN as detectron2's `ProposalNetwork`, on the row's schedule.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`; not changed.
        stage: name of the stage's folder in `train.output_dir`.

    Returns:
        A config for `do_train`, which evaluates the average recall of the boxes.
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
    cfg.dataloader.evaluator.output_dir = None  # gigabytes of boxes, at each evaluation
    return cfg


def detector_stage(cfg: DictConfig, stage: str, proposals: ProposalFiles) -> DictConfig:
    """The row's model without its RPN, trained and tested on proposals from files.

    Args:
        cfg, stage: as in `rpn_stage`.
        proposals: from `write_proposals`.

    Returns:
        A config for `do_train`.
    """
    cfg = _stage(cfg, stage)
    topk = cfg.model.proposal_generator.post_nms_topk
    cfg.model.proposal_generator = None  # what detectron2's "PrecomputedProposals" stands for
    loaders = (cfg.dataloader.train, cfg.dataloader.test)
    for loader, files, number in zip(loaders, proposals, topk):
        loader.dataset.proposal_files = files
        loader.mapper.precomputed_proposal_topk = number
    return cfg


def fix_backbone(cfg: DictConfig, weights: str) -> DictConfig:
    """A stage that starts from the weights of another one and keeps their backbone as it is.

    Args:
        cfg: from `rpn_stage` or `detector_stage`; not changed.
        weights: the other stage's checkpoint.
    """
    cfg = copy.deepcopy(cfg)
    cfg.train.init_checkpoint = weights
    cfg.model.backbone = L(fixed)(module=cfg.model.backbone)
    return cfg


def fixed(module: nn.Module) -> nn.Module:
    """Let nothing in a module change in training: neither parameters nor running statistics.

    Batch normalisation becomes detectron2's frozen one, whose parameters are buffers under the same
    names, so that checkpoints fit.
    """
    for parameter in module.parameters():
        parameter.requires_grad = False
    return FrozenBatchNorm2d.convert_frozen_batchnorm(module)


def train_stages(cfg: DictConfig, regime: str) -> dict[str, Any]:
    """Train a row by a regime. What an earlier run has finished is not done again.

    In `train.output_dir`, a folder for each stage with what `do_train` writes there, and the
    stage's config; proposals are in `proposals/` of an RPN's. `stages.json` records what is done.
    To do a stage again, delete its folder and all after it.

    "separate": 1_rpn, 2_detector; the result is 2_detector's.
    "4step": 1_rpn, 2_detector, 3_rpn and 4_detector, the last two on 2_detector's backbone; then
    `model_final.pth`, one model of the row, and its `results.json`.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.
        regime: one of `REGIMES`.

    Returns:
        {task: {metric: AP in points}}; {} for a test set without annotations.

    Raises:
        ConfigError: see `check_stages`.
        WeightsError: as `do_train`, or if stages that should have one backbone have not.
        SaveError: as `do_train`.
    """
    check_stages(cfg, regime)
    if comm.is_main_process():
        record = _read_record(cfg) or {"regime": regime, "config": deciding(cfg), "results": {}}
        _write_record(cfg, record)
    comm.synchronize()
    root = Path(cfg.train.output_dir)

    rpn = rpn_stage(cfg, "1_rpn")
    _run(cfg, rpn, "RPN")
    detector = detector_stage(cfg, "2_detector", write_proposals(rpn))
    results = _run(cfg, detector, "Mask R-CNN on the proposals of 1_rpn")
    if regime == "separate":
        return results

    weights = str(root / "2_detector" / CHECKPOINT)
    rpn = fix_backbone(rpn_stage(cfg, "3_rpn"), weights)
    _run(cfg, rpn, "RPN on the fixed backbone of 2_detector")
    detector = fix_backbone(detector_stage(cfg, "4_detector", write_proposals(rpn)), weights)
    _run(cfg, detector, "heads of 2_detector, on its fixed backbone and the proposals of 3_rpn")
    return _unite(cfg)


def check_stages(cfg: DictConfig, regime: str) -> None:
    """Whether the stages of a regime can be trained, or gone on with, in `train.output_dir`.

    Args:
        cfg, regime: as in `train_stages`.

    Raises:
        ConfigError: if there is no such regime, the model has no RPN, or the folder holds stages of
            another regime or config.
    """
    if regime not in REGIMES:
        raise ConfigError(f"regime is {regime!r}, must be one of {REGIMES}")
    if cfg.model.get("proposal_generator") is None:
        raise ConfigError("model.proposal_generator is null: there is no RPN to train")
    record = _read_record(cfg)
    if not record:
        return
    before = {"regime": record["regime"], **record["config"]}
    now = {"regime": regime, **deciding(cfg)}
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if keys:
        differing = [f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in keys[:3]]
        raise ConfigError(
            f"{cfg.train.output_dir} holds stages of another training: give the same config and "
            f"regime to go on with it, or another train.output_dir=...; {'; '.join(differing)}"
            + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        )


def unite_weights(detector: Path, rpn: Path, heads: Path) -> dict[str, Tensor]:
    """The state dict of the one model that the 4 steps end in.

    Args:
        detector: checkpoint of step (2), whose backbone (3) and (4) hold fixed.
        rpn: of (3).
        heads: of (4).

    Returns:
        The backbone, (3)'s `proposal_generator` and (4)'s `roi_heads`, under the row's own names.

    Raises:
        WeightsError: if the three have not one and the same backbone.
    """
    base, *others = (
        torch.load(path, map_location="cpu", weights_only=True)["model"]
        for path in (detector, rpn, heads)
    )
    # (2)'s: batch normalisation has a counter that frozen one lacks in some detectron2s.
    united = {k: v for k, v in base.items() if k.startswith("backbone.")}
    for path, weights in zip((rpn, heads), others):
        for key, value in weights.items():
            if not key.startswith("backbone."):
                united[key] = value
            elif key not in united or not torch.equal(value, united[key]):
                raise WeightsError(
                    f"{path} has not the backbone of {detector}: {key} differs. Delete its folder "
                    "and those after it to train them again"
                )
    return united


def summary(results: Mapping[str, Mapping[str, float]]) -> str:
    """The main metrics in one line, e.g. "box_proposals AR@100 40.1, AR@1000 52.3"."""
    return "; ".join(
        f"{task} " + ", ".join(f"{k} {m[k]:.1f}" for k in ("AP", "AR@100", "AR@1000") if k in m)
        for task, m in results.items()
    )


def _stage(cfg: DictConfig, stage: str) -> DictConfig:
    """A copy that has a folder of its own and no interpolations, so that nodes may be moved."""
    cfg = copy.deepcopy(cfg)
    cfg.train.output_dir = str(Path(cfg.train.output_dir) / stage)
    OmegaConf.resolve(cfg)
    return cfg


def _run(cfg: DictConfig, stage_cfg: DictConfig, what: str) -> dict[str, Any]:
    """Train a stage of the row `cfg`, or go on with it, unless it is finished."""
    output = Path(stage_cfg.train.output_dir)
    results = _finished(cfg, output.name, output / CHECKPOINT)
    if results is not None:
        logger.info("%s: %s; finished already. %s", output, what, summary(results))
        return results
    logger.info("%s: %s; %d iterations", output, what, stage_cfg.train.max_iter)
    if comm.is_main_process():
        record = _read_record(cfg)
        for name in (output.name, CHECKPOINT):  # an earlier run's one model is not of this stage
            record["results"].pop(name, None)
        _write_record(cfg, record)
        output.mkdir(parents=True, exist_ok=True)
        LazyConfig.save(stage_cfg, str(output / "config.yaml"))
    if stage_cfg.train.seed >= 0:
        # A stage is the same whether or not those before it ran in this process.
        seed_all_rng(stage_cfg.train.seed + comm.get_rank())
    results = do_train(stage_cfg, resume=True)
    _finish(cfg, output.name, results)
    logger.info("%s: finished. %s", output, summary(results))
    return results


def _finished(cfg: DictConfig, stage: str, checkpoint: Path) -> dict[str, Any] | None:
    """Results of a stage, None if there is something left to do."""
    return _read_record(cfg)["results"].get(stage) if checkpoint.is_file() else None


def _finish(cfg: DictConfig, stage: str, results: dict[str, Any]) -> None:
    if comm.is_main_process():
        record = _read_record(cfg)
        record["results"][stage] = results
        _write_record(cfg, record)
    comm.synchronize()


def _unite(cfg: DictConfig) -> dict[str, Any]:
    """Make one model of the stages of "4step", and evaluate it."""
    root = Path(cfg.train.output_dir)
    checkpoint = root / CHECKPOINT
    results = _finished(cfg, CHECKPOINT, checkpoint)
    if results is not None:
        logger.info("%s: one model; finished already. %s", checkpoint, summary(results))
        return results
    logger.info("%s: one model of 3_rpn's RPN and 4_detector's backbone and heads", checkpoint)
    stages = [root / stage / CHECKPOINT for stage in ("2_detector", "3_rpn", "4_detector")]
    if comm.is_main_process():
        write_checkpoint(checkpoint, {"model": unite_weights(*stages)})
    comm.synchronize()
    model = instantiate(cfg.model).to(cfg.train.device)
    SafeCheckpointer(model).load_strictly(str(checkpoint))
    results = evaluate(cfg, model)
    _finish(cfg, CHECKPOINT, results)
    return results


def _read_record(cfg: DictConfig) -> dict[str, Any]:
    """{"regime", "config", "results": {stage: ...}} of a row's folder; {} where none is yet."""
    path = Path(cfg.train.output_dir) / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_record(cfg: DictConfig, record: Mapping[str, Any]) -> None:
    path = Path(cfg.train.output_dir) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")
