import copy
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.build import load_proposals_into_dataset
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, BoxMode, Instances
from omegaconf import DictConfig
from torch import Tensor, nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError, list_configs
from mask_rcnn_plugin.data.mapper import MaskRCNNDatasetMapper
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.training.weights import WeightsError
from train import do_train
from train_stages import regimes as rpn_regimes
from train_stages.proposals import ProposalFiles, ProposalWriter, write_proposals
from train_stages.regimes import (
    check_stages,
    detector_stage,
    fix_backbone,
    fixed,
    rpn_stage,
    train_stages,
    unite_weights,
)

C4, FPN = "table2a_backbone/r50_c4+synthetic", "table2a_backbone/r50_fpn+synthetic"
FILES = ProposalFiles(["a.pkl"], ["b.pkl"])
THIN = "model.backbone.width=16"


@pytest.fixture
def cfg(toy_overrides: list[str]) -> DictConfig:
    cfg = get_config(FPN, [*toy_overrides, THIN])
    setup_datasets(cfg)
    return cfg


def shapes(model: nn.Module, *prefixes: str) -> dict[str, torch.Size]:
    items = model.state_dict().items()
    return {k: v.shape for k, v in items if not prefixes or k.startswith(prefixes)}


def weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    model = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in model.items() if k.startswith(prefix)}


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what batch normalisation has, and frozen one in some detectron2s only."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", list_configs())
def test_every_config_has_stages(name: str) -> None:
    row = get_config(name)
    before = copy.deepcopy(row)
    rpn = fix_backbone(rpn_stage(row, "1_rpn"), "w.pth")
    detector = fix_backbone(detector_stage(row, "2_detector", FILES), "w.pth")
    assert row == before
    assert rpn.train.output_dir == f"output/{name}/1_rpn"
    assert rpn.train.init_checkpoint == detector.train.init_checkpoint == "w.pth"
    assert rpn.model.proposal_generator.post_nms_topk == row.model.proposal_generator.post_nms_topk
    assert detector.model.proposal_generator is None
    for stage in (rpn, detector):
        assert stage.model.backbone.module.name == row.model.backbone.name
        assert stage.lr_multiplier == before.lr_multiplier
        assert stage.train.max_iter == row.train.max_iter


def test_stages_have_the_rows_parameters(cfg: DictConfig) -> None:
    row = instantiate(cfg.model)
    rpn = instantiate(rpn_stage(cfg, "1_rpn").model)
    assert shapes(rpn) == shapes(row, "backbone.", "proposal_generator.")
    detector = instantiate(detector_stage(cfg, "2_detector", FILES).model)
    assert shapes(detector) == shapes(row, "backbone.", "roi_heads.")


def test_detector_takes_as_many_proposals_as_the_rows_rpn_gives(cfg: DictConfig) -> None:
    cfg.model.proposal_generator.post_nms_topk = (7, 3)
    loaders = detector_stage(cfg, "2_detector", FILES).dataloader
    assert loaders.train.dataset.proposal_files == ["a.pkl"]
    assert loaders.test.dataset.proposal_files == ["b.pkl"]
    assert loaders.train.mapper.precomputed_proposal_topk == 7
    assert loaders.test.mapper.precomputed_proposal_topk == 3


def test_fixed_keeps_statistics_and_parameters_in_training() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1))
    x = torch.randn(2, 3, 8, 8)
    layer(5 * x)  # statistics that differ from the initial ones
    before = copy.deepcopy(layer.state_dict())
    expected = layer.eval()(x)
    frozen = fixed(copy.deepcopy(layer)).train()
    assert isinstance(frozen[1], FrozenBatchNorm2d)
    torch.testing.assert_close(frozen(x), expected)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert same(without_counters(frozen.state_dict()), without_counters(before))


def test_proposals_are_read_back_in_pixels_of_the_image_on_disk(cfg: DictConfig) -> None:
    cfg.model.proposal_generator.post_nms_topk = (30, 10)
    stage = rpn_stage(cfg, "1_rpn")
    model = instantiate(stage.model).eval()
    output = Path(stage.train.output_dir)
    output.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, output / "model_final.pth")

    files = write_proposals(stage)
    assert [len(names) for names in files] == [1, 1]
    for names, paths, number in (
        (cfg.dataset.train.names, files.train, 30),
        (cfg.dataset.test.names, files.test, 10),
    ):
        records = load_proposals_into_dataset(DatasetCatalog.get(names[0]), paths[0])
        assert {len(record["proposal_boxes"]) for record in records} == {number}

    inputs = next(iter(instantiate(cfg.dataloader.test)))
    assert inputs[0]["image"].shape[1:] == (128, 128)
    assert (inputs[0]["height"], inputs[0]["width"]) == (64, 64)
    with torch.no_grad():
        images = instantiate(cfg.model).eval().preprocess_image(inputs)
        features = model.backbone(images.tensor)
        (expected,), _ = model.proposal_generator(images, features)
    assert expected.proposal_boxes.tensor.max() > 64
    record = next(r for r in records if r["image_id"] == inputs[0]["image_id"])
    boxes = torch.from_numpy(record["proposal_boxes"])
    torch.testing.assert_close(boxes, expected.proposal_boxes.tensor / 2)
    logits = torch.from_numpy(record["proposal_objectness_logits"])
    torch.testing.assert_close(logits, expected.objectness_logits)
    assert record["proposal_bbox_mode"] == BoxMode.XYXY_ABS


def test_images_without_annotations_have_proposals_too(
    toy_dataset: Path, toy_overrides: list[str], tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "train.json").read_text())
    empty = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
    (tmp_path / "train.json").write_text(json.dumps(content))
    own = [f"dataset.train.json={tmp_path / 'train.json'}"]
    cfg = get_config(C4, [*toy_overrides, THIN, *own])
    setup_datasets(cfg)
    stage = rpn_stage(cfg, "1_rpn")
    Path(stage.train.output_dir).mkdir(parents=True)
    checkpoint = Path(stage.train.output_dir) / "model_final.pth"
    torch.save({"model": instantiate(stage.model).state_dict()}, checkpoint)
    detector = detector_stage(cfg, "2_detector", write_proposals(stage))
    # detectron2 fails on an image of the dataset that the file lacks, used for training or not.
    records = instantiate(detector.dataloader.train.dataset)
    assert len(records) == 11
    assert all(len(r["proposal_boxes"]) for r in records)


def test_proposal_files_that_are_there_are_left(cfg: DictConfig) -> None:
    stage = rpn_stage(cfg, "1_rpn")
    folder = Path(stage.train.output_dir) / "proposals"
    folder.mkdir(parents=True)
    for name in ("train_0.pkl", "test_0.pkl"):
        (folder / name).write_text("kept")
    files = write_proposals(stage)
    assert [Path(f).read_text() for f in (*files.train, *files.test)] == ["kept", "kept"]


def test_a_proposal_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ProposalWriter(tmp_path / "p.pkl")
    writer.reset()
    proposals = Instances((8, 8))
    proposals.proposal_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    proposals.objectness_logits = torch.tensor([0.5])
    writer.process([{"image_id": 3}], [{"proposals": proposals}])
    with monkeypatch.context() as patch:

        def interrupted(content: Any, file: Any, **kwargs: Any) -> None:
            file.write(b"part")
            raise KeyboardInterrupt

        patch.setattr(pickle, "dump", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.evaluate()
    assert not (tmp_path / "p.pkl").exists()
    writer.evaluate()
    assert [f.name for f in tmp_path.iterdir()] == ["p.pkl"]
    content = pickle.loads((tmp_path / "p.pkl").read_bytes())
    assert content["ids"] == [3]
    assert content["boxes"][0].dtype == np.float32


def test_proposals_are_resized_and_flipped_with_the_image(cfg: DictConfig) -> None:
    mapper = MaskRCNNDatasetMapper(
        is_train=True,
        augmentations=[T.Resize((128, 128)), T.RandomFlip(prob=1.0)],
        image_format="BGR",
        use_instance_mask=True,
        precomputed_proposal_topk=2,
    )
    record = DatasetCatalog.get(cfg.dataset.train.names[0])[0]
    record["proposal_boxes"] = np.float32([[0, 10, 20, 30], [4, 4, 8, 8], [1, 1, 9, 9]])
    record["proposal_objectness_logits"] = np.float32([3, 2, 1])
    record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
    proposals = mapper(record)["proposals"]
    expected = torch.tensor([[88.0, 20.0, 128.0, 60.0], [112.0, 8.0, 120.0, 16.0]])
    torch.testing.assert_close(proposals.proposal_boxes.tensor, expected)
    assert proposals.objectness_logits.tolist() == [3, 2]
    assert proposals.image_size == (128, 128)


def test_stages_with_different_backbones_are_not_united(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("detector", "rpn", "heads")]
    for file, value in zip(files, (1.0, 1.0, 2.0)):
        torch.save({"model": {"backbone.a": torch.tensor([value])}}, file)
    with pytest.raises(WeightsError, match=r"heads has not the backbone .*: backbone\.a differs"):
        unite_weights(*files)


def test_unknown_regime_and_model_without_rpn_are_errors(cfg: DictConfig) -> None:
    with pytest.raises(ConfigError, match="regime is 'joint', must be one of"):
        check_stages(cfg, "joint")
    cfg.model.proposal_generator = None
    with pytest.raises(ConfigError, match="proposal_generator is null"):
        check_stages(cfg, "4step")


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

    monkeypatch.setattr(rpn_regimes, "do_train", traced)
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

    with pytest.raises(ConfigError, match="regime: '4step' there, 'separate' here"):
        check_stages(row(), "separate")
    other = row()
    other.train.max_iter = 3
    with pytest.raises(ConfigError, match=r"train\.max_iter: 2 there, 3 here"):
        check_stages(other, "4step")
    other = row()
    other.dataloader.train.num_workers = 5
    check_stages(other, "4step")
