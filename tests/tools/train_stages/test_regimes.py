"""The regimes: what is trained, what is not trained again, and what comes out."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import Tensor

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training import setup_datasets
from train import do_train
from train_stages import regimes
from train_stages.regimes import check_record, read_record, train_stages, unite_weights

C4 = "table2a_backbone/r50_c4+synthetic"
THIN = "model.backbone.width=16"


def weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    model = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in model.items() if k.startswith(prefix)}


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what batch normalisation has, and frozen one in some detectron2s only."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stages_with_different_backbones_are_not_united(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("detector", "rpn", "heads")]
    for file, value in zip(files, (1.0, 1.0, 2.0)):
        torch.save({"model": {"backbone.a": torch.tensor([value])}}, file)
    with pytest.raises(UserError, match=r"heads and .*detector have .* backbone\.a differs"):
        unite_weights(*files)


class Interrupt(HookBase):
    """Ends a training after its first iteration, as Ctrl-C does."""

    def after_step(self) -> None:
        raise KeyboardInterrupt


class Starts(HookBase):
    """Where trainings start."""

    def __init__(self) -> None:
        self.iterations: list[int] = []

    def before_train(self) -> None:
        self.iterations.append(self.trainer.start_iter)


def add_hooks(
    monkeypatch: pytest.MonkeyPatch, stage: str, hooks: Sequence[HookBase]
) -> list[tuple[str, bool]]:
    """Let a stage train with more hooks; returns the stages that are trained from now on."""
    trained = []

    def traced(cfg: DictConfig, *, resume: bool) -> dict[str, Any]:
        name = Path(cfg.train.output_dir).name
        trained.append((name, resume))
        return do_train(cfg, resume=resume, extra_hooks=hooks if name == stage else ())

    monkeypatch.setattr(regimes, "do_train", traced)
    return trained


def test_c4_in_4_steps_interrupted_and_gone_on_with(
    toy_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row() -> DictConfig:
        cfg = get_config(C4, [*toy_overrides, THIN, "train.checkpointer.period=1"])
        setup_datasets(cfg)
        return cfg

    add_hooks(monkeypatch, "3_rpn", [Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        train_stages(row(), "4step")
    out = tmp_path / "out"
    assert not (out / "3_rpn" / "model_final.pth").exists()
    # As if it had been stopped while it wrote down that stage 2 is finished.
    record = json.loads((out / "stages.json").read_text())
    assert list(record["results"]) == ["1_rpn", "2_detector"]
    del record["results"]["2_detector"]
    (out / "stages.json").write_text(json.dumps(record))
    second = weights(out / "2_detector" / "model_final.pth")

    starts = Starts()
    trained = add_hooks(monkeypatch, "3_rpn", [starts])
    results = train_stages(row(), "4step")
    assert trained == [("2_detector", True), ("3_rpn", True), ("4_detector", True)]
    assert starts.iterations == [1]
    assert same(weights(out / "2_detector" / "model_final.pth"), second)
    assert list(results) == ["bbox", "segm"]

    final = weights(out / "model_final.pth")
    assert final.keys() == instantiate(row().model).state_dict().keys()
    backbone = {k: v for k, v in final.items() if k.startswith("backbone.")}
    assert same(backbone, weights(out / "2_detector" / "model_final.pth", "backbone."))
    assert backbone["backbone.stem.conv1.norm.running_mean"].any()
    for stage in ("3_rpn", "4_detector"):
        kept = weights(out / stage / "model_final.pth", "backbone.")
        assert same(without_counters(kept), without_counters(backbone))
    heads = {k: v for k, v in final.items() if k.startswith("roi_heads.")}
    assert same(heads, weights(out / "4_detector" / "model_final.pth", "roi_heads."))
    assert any("roi_heads.res5" in k and not torch.equal(v, second[k]) for k, v in heads.items())

    shutil.rmtree(out / "4_detector")
    united_at = (out / "model_final.pth").stat().st_mtime_ns
    trained = add_hooks(monkeypatch, "", [])
    train_stages(row(), "4step")
    assert trained == [("4_detector", True)]
    assert (out / "model_final.pth").stat().st_mtime_ns > united_at
    again = weights(out / "model_final.pth", "roi_heads.")
    assert same(again, weights(out / "4_detector" / "model_final.pth", "roi_heads."))
    assert same(again, heads)  # the seed is each stage's own


@pytest.fixture
def row(toy_overrides: list[str]) -> DictConfig:
    cfg = get_config(C4, toy_overrides)
    setup_datasets(cfg)
    return cfg


DONE = {"1_rpn": {}, "2_detector": {"bbox": {"AP": 12.0}}}


def write_record(cfg: DictConfig, results: dict[str, Any]) -> Path:
    """As an earlier run leaves it, with the stages' checkpoints."""
    out = Path(cfg.train.output_dir)
    out.mkdir(parents=True)
    record = {**read_record(cfg, "4step"), "results": results}
    (out / "stages.json").write_text(json.dumps(record))
    for stage in results:
        (out / stage).mkdir()
        (out / stage / "model_final.pth").touch()
    return out


def test_a_stage_is_done_if_its_checkpoint_is_there_too(row: DictConfig) -> None:
    out = write_record(row, DONE)
    assert read_record(row, "4step")["results"] == DONE
    (out / "1_rpn" / "model_final.pth").unlink()
    assert read_record(row, "4step")["results"].keys() == {"2_detector"}


def test_rank_0_decides_what_is_done(row: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on rank 1 of a machine that sees none of the files yet."""
    rank_0 = [{**read_record(row, "separate"), "results": DONE}, True, True]  # of two datasets
    monkeypatch.setattr(comm, "all_gather", lambda mine: [rank_0.pop(0), mine])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert train_stages(row, "separate") == {"bbox": {"AP": 12.0}}
    assert not rank_0
    assert not Path(row.train.output_dir).exists()


def test_another_training_in_the_folder_is_refused(row: DictConfig) -> None:
    write_record(row, DONE)
    check_record(row, "4step", read_record(row, "4step"))
    row.dataloader.train.num_workers = 5  # no weight depends on it
    check_record(row, "4step", read_record(row, "4step"))
    with pytest.raises(ConfigError, match="regime: '4step' there, 'separate' here"):
        check_record(row, "separate", read_record(row, "separate"))
    row.train.max_iter = 3
    with pytest.raises(ConfigError, match=r"train\.max_iter: 2 there, 3 here"):
        check_record(row, "4step", read_record(row, "4step"))


def test_a_model_without_rpn_is_refused(row: DictConfig) -> None:
    row.model.proposal_generator = None
    with pytest.raises(ConfigError, match="proposal_generator is null"):
        train_stages(row, "4step")
