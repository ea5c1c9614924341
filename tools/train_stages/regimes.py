"""The paper's ways to train RPN and Mask R-CNN apart from each other (Sec. 3.1, 4.4)."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from torch import Tensor

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.config import ConfigError, deciding
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.evaluation.testing import evaluate
from train import do_train
from train_stages.proposals import write_proposals
from train_stages.stages import detector_stage, fix_backbone, rpn_stage

REGIMES = ("separate", "4step")
CHECKPOINT = "model_final.pth"
RECORD = "stages.json"
UNITED = "."  # the folder of the one model, in the record of stages

logger = logging.getLogger(__name__)

# {"regime", "config": what decides the training, "results": {stage: ...} of those that are done}
Record = dict[str, Any]


def train_stages(cfg: DictConfig, regime: str) -> dict[str, Any]:
    """Train a row by one of `REGIMES`. What an earlier run has finished is not done again.

    In `train.output_dir`, each stage has a folder with what `do_train` writes, its config and, of
    an RPN, `proposals/`; `stages.json` records what is done, and of "4step" `model_final.pth` is
    the one model of the row. To do a stage again, delete its folder and all after it.

    Returns:
        {task: {metric: AP in points}} of 2_detector, or of the one model; {} for a test set without
        annotations.

    Raises:
        ConfigError: see `check_record`.
        UserError: if stages that should have one backbone have different ones.
    """
    # Rank 0's: other machines may not see yet what it has written.
    record = comm.all_gather(read_record(cfg, regime))[0]
    check_record(cfg, regime, record)
    root = Path(cfg.train.output_dir)

    rpn = rpn_stage(cfg, "1_rpn")
    _run(rpn, record, "RPN")
    detector = detector_stage(cfg, "2_detector", write_proposals(rpn))
    results = _run(detector, record, "Mask R-CNN on the proposals of 1_rpn")
    if regime == "separate":
        return results

    weights = root / "2_detector" / CHECKPOINT
    rpn = fix_backbone(rpn_stage(cfg, "3_rpn"), weights)
    _run(rpn, record, "RPN on the fixed backbone of 2_detector")
    detector = fix_backbone(detector_stage(cfg, "4_detector", write_proposals(rpn)), weights)
    _run(detector, record, "heads of 2_detector, on its fixed backbone and 3_rpn's proposals")
    return _unite(cfg, record)


def read_record(cfg: DictConfig, regime: str) -> Record:
    """What is done in `train.output_dir`; a new record where nothing is."""
    root = Path(cfg.train.output_dir)
    if not (root / RECORD).is_file():
        return {"regime": regime, "config": deciding(cfg), "results": {}}
    record = json.loads((root / RECORD).read_text())
    done = record["results"].items()
    record["results"] = {k: v for k, v in done if (root / k / CHECKPOINT).is_file()}
    return record


def check_record(cfg: DictConfig, regime: str, record: Record) -> None:
    """
    Raises:
        ConfigError: if the model has no RPN, or the record is of another regime or config.
    """
    if cfg.model.get("proposal_generator") is None:
        raise ConfigError("model.proposal_generator is null: there is no RPN to train")
    before = {"regime": record["regime"], **record["config"]}
    now = {"regime": regime, **deciding(cfg)}
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if keys:
        differing = [f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in keys[:3]]
        raise ConfigError(
            f"{cfg.train.output_dir} holds stages of another training: give the same config and "
            f"regime to continue it, or another train.output_dir=...; {'; '.join(differing)}, "
            f"{len(keys)} in all"
        )


def _run(cfg: DictConfig, record: Record, what: str) -> dict[str, Any]:
    """Train a stage, or go on with it, unless it is done."""
    output = Path(cfg.train.output_dir)
    done = record["results"]
    if output.name in done:
        logger.info("%s: %s; finished already. %s", output, what, done[output.name])
        return done[output.name]
    logger.info("%s: %s; %d iterations", output, what, cfg.train.max_iter)
    done.pop(UNITED, None)  # an earlier run's, which is not of this stage
    _write_record(output.parent, record)
    if comm.is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        LazyConfig.save(cfg, str(output / "config.yaml"))
    if cfg.train.seed >= 0:
        # A stage is the same whether or not those before it ran in this process.
        seed_all_rng(cfg.train.seed + comm.get_rank())
    done[output.name] = do_train(cfg, resume=True)
    _write_record(output.parent, record)
    logger.info("%s: finished. %s", output, done[output.name])
    return done[output.name]


def _unite(cfg: DictConfig, record: Record) -> dict[str, Any]:
    """Make one model of the stages of "4step", and evaluate it."""
    root = Path(cfg.train.output_dir)
    checkpoint = root / CHECKPOINT
    done = record["results"]
    if UNITED in done:
        logger.info("%s: one model; finished already", checkpoint)
        return done[UNITED]
    logger.info("%s: one model of 3_rpn's RPN and 4_detector's backbone and heads", checkpoint)
    if comm.is_main_process():
        stages = [root / stage / CHECKPOINT for stage in ("2_detector", "3_rpn", "4_detector")]
        with atomic_write(checkpoint) as file:
            torch.save({"model": unite_weights(*stages)}, file)
    comm.synchronize()
    model = instantiate(cfg.model).to(device_of(cfg))
    model.load_state_dict(torch.load(checkpoint, "cpu", weights_only=True)["model"])
    done[UNITED] = evaluate(cfg, model)
    _write_record(root, record)
    return done[UNITED]


def unite_weights(detector: Path, rpn: Path, heads: Path) -> dict[str, Tensor]:
    """The one model that the 4 steps end in, from the checkpoints of (2), (3) and (4).

    It has the backbone of (2), which (3) and (4) hold fixed, (3)'s `proposal_generator` and (4)'s
    `roi_heads`, under the row's own names.

    Raises:
        UserError: if the three have different backbones.
    """
    base, *others = (
        torch.load(path, "cpu", weights_only=True)["model"] for path in (detector, rpn, heads)
    )
    # (2)'s: batch normalization has a counter that the frozen one lacks in some detectron2s.
    united = {k: v for k, v in base.items() if k.startswith("backbone.")}
    for path, weights in zip((rpn, heads), others):
        for key, value in weights.items():
            if not key.startswith("backbone."):
                united[key] = value
            elif key not in united or not torch.equal(value, united[key]):
                raise UserError(
                    f"{path} and {detector} have different backbones: {key} differs. Delete the "
                    "first one's folder and those after it to train them again"
                )
    return united


def _write_record(root: Path, record: Record) -> None:
    if comm.is_main_process():
        root.mkdir(parents=True, exist_ok=True)
        with atomic_write(root / RECORD) as file:
            file.write(json.dumps(record, indent=2).encode() + b"\n")
    comm.synchronize()
