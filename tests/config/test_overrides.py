"""key=value: what it sets, and what a wrong one is told."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.config.overrides import apply_override


@pytest.fixture(scope="module")
def row() -> DictConfig:
    return get_config("table2a_backbone/r50_fpn")


def changed(row: DictConfig, override: str) -> DictConfig:
    cfg = OmegaConf.create(row, flags={"allow_objects": True})
    apply_override(cfg, override)
    return cfg


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=10", "train.max_iter", 10),
        ("train.max_iter=1e3", "train.max_iter", 1000),
        ("train.max_iter=1.5e0", "train.max_iter", 1.5),  # which the check refuses
        ("train.reference_batch_size=1e1", "train.reference_batch_size", 10),
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=1", "optimizer.lr", 1),
        ("train.amp.enabled=true", "train.amp.enabled", True),
        ("train.channels_last=false", "train.channels_last", False),
        ("model.proposal_generator.nms_thresh=.5", "model.proposal_generator.nms_thresh", 0.5),
        ("dataset.train.names=[a, b]", "dataset.train.names", ["a", "b"]),
        ("train.init_checkpoint=", "train.init_checkpoint", ""),
        ("train.init_checkpoint=null", "train.init_checkpoint", None),
        ("train.best_metric=null", "train.best_metric", None),
        ("model.roi_heads.keypoint_head=null", "model.roi_heads.keypoint_head", None),
        (
            "dataloader.test.mapper.augmentations.0.max_size=9",
            "dataloader.test.mapper.augmentations[0].max_size",
            9,
        ),
        ("model.pixel_std.1=2.5", "model.pixel_std[1]", 2.5),
        # not written in the config, but an argument of the callable there
        (
            "dataloader.train.aspect_ratio_grouping=false",
            "dataloader.train.aspect_ratio_grouping",
            False,
        ),
        ("model.roi_heads.train_on_pred_boxes=true", "model.roi_heads.train_on_pred_boxes", True),
        ("model.proposal_generator.nms_thresh=null", "model.proposal_generator.nms_thresh", None),
    ],
)
def test_a_value_is_set(row: DictConfig, override: str, key: str, value: Any) -> None:
    found = OmegaConf.select(changed(row, override), key)
    assert found == value
    assert isinstance(value, list) or type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "20231105",
            "/a b/c=d.json",
            "data #1/train.json",
            "[part 1].json",
            "{x}",
            "~/data",
            "=a",
        ),
        *("1e3", "true", "a: b", "'quoted'", "- x", "*", "&a", "!!python/name:os.mkdir", "a,b"),
    ],
)
@pytest.mark.parametrize("key", ["dataset.train.json", "train.output_dir", "model.backbone.name"])
def test_text_is_taken_as_it_is(row: DictConfig, key: str, text: str) -> None:
    assert OmegaConf.select(changed(row, f"{key}={text}"), key) == text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.max_iters=10", ["'train.max_iters'", "did you mean 'train.max_iter'"]),
        ("trian.amp.enabled=true", ["'trian'", "did you mean 'train.amp.enabled'"]),
        ("model.backbone.nam=x", ["did you mean 'model.backbone.name'"]),
        ("model.backbone.depth=50", ["'model.backbone.depth'", "freeze_at"]),
        ("lr=0.1", ["'lr'", "'optimizer.lr'"]),
        ("epochs=3", ["'epochs'", "'train.max_iter'"]),
        ("batch_size=3", ["'dataloader.train.total_batch_size'"]),
        ("SOLVER.BASE_LR=0.1", ["'optimizer.lr'"]),
        ("SOLVER.IMS_PER_BATCH=2", ["'dataloader.train.total_batch_size'"]),
        ("SOLVER.MAX_ITER=2", ["'train.max_iter'"]),
        ("MODEL.WEIGHTS=a.pkl", ["'train.init_checkpoint'"]),
        ("num_classes=3", ["'model.roi_heads.num_classes'"]),
        ("device=cpu", ["'train.device'"]),
        ("output_dir=x", ["'train.output_dir'"]),
        ("model.pixel_std.3=1", ["'model.pixel_std.3'", "['0', '1', '2']"]),
        ("train.max_iter.deeper=1", ["'train.max_iter.deeper'"]),
        ("train.max_iter", ["'train.max_iter'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("train.max_iter=[", ["'train.max_iter=['", "YAML"]),
        ("train.max_iter=${train.eval_period}", ["'${train.eval_period}'"]),
        ("train.output_dir=${oc.env:HOME}", ["'${oc.env:HOME}'"]),
        ("train.ddp.static_graph=true", ["'train.ddp.static_graph'"]),
        ("+dataloader.test.mapper.augmentations.7=1", ["augmentations.7=1"]),
    ],
)
def test_a_wrong_override_is_refused(row: DictConfig, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        changed(row, override)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "code",
    [
        "!!python/object/apply:os.mkdir [{marker}]",
        "[!!python/object/apply:os.mkdir [{marker}]]",
        "!!python/object/new:os.mkdir [{marker}]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
    ],
)
def test_an_override_cannot_make_objects(row: DictConfig, code: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ConfigError, match="YAML"):
        changed(row, f"train.seed={code.format(marker=marker)}")
    assert not marker.exists()


def test_a_tuple_is_replaced_by_a_list(row: DictConfig) -> None:
    key = "model.proposal_generator.post_nms_topk"
    assert list(OmegaConf.select(changed(row, f"{key}=[9, 8]"), key)) == [9, 8]


def test_a_plus_sets_a_new_key() -> None:
    overrides = ["+train.ddp.static_graph=true", "+mine.depth=3", "+dataloader.extra=1"]
    cfg = get_config("table2a_backbone/r50_fpn", overrides)
    assert (cfg.train.ddp.static_graph, cfg.mine.depth, cfg.dataloader.extra) == (True, 3, 1)
