"""The configs of the stages."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from omegaconf import DictConfig
from torch import nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training import setup_datasets
from train_stages.stages import detector_stage, fix_backbone, fixed, rpn_stage

FPN = "table2a_backbone/r50_fpn+synthetic"
FILES = (["a.pkl"], ["b.pkl"])


@pytest.fixture
def cfg(toy_overrides: list[str]) -> DictConfig:
    cfg = get_config(FPN, [*toy_overrides, "model.backbone.width=16"])
    setup_datasets(cfg)
    return cfg


def shapes(model: nn.Module, *prefixes: str) -> dict[str, torch.Size]:
    items = model.state_dict().items()
    return {k: v.shape for k, v in items if not prefixes or k.startswith(prefixes)}


@pytest.mark.parametrize(
    "name",
    [
        "table1_main/x101_fpn",
        "table2d_stride32/roialign",
        "class_agnostic/r50_c4",
        "table3_box/faster_rcnn_r101_fpn",
        "table5_multitask/keypoint_and_mask",
    ],
)
def test_a_row_of_any_kind_has_stages(name: str) -> None:
    row = get_config(name)
    before = copy.deepcopy(row)
    rpn = fix_backbone(rpn_stage(row, "1_rpn"), Path("w.pth"))
    detector = fix_backbone(detector_stage(row, "2_detector", FILES), Path("w.pth"))
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
    for name, value in frozen.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # which frozen layers have in some detectron2s
            assert torch.equal(value, before[name]), name
