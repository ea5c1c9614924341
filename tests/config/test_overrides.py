"""key=value: what it sets, and what a wrong one is told."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.config.overrides import _OTHER_NAMES, apply_override

RPN = "model.proposal_generator"
SCHEDULE = "lr_multiplier.scheduler"
TOPK = "model.proposal_generator.post_nms_topk"
RESIZE = "dataloader.train.mapper.augmentations.0"
PROPOSALS = "dataloader.test.dataset.proposal_files"


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
        ("train.max_iter=010", "train.max_iter", 10),  # no octal number
        ("train.max_iter=90_000", "train.max_iter", 90_000),
        ("train.max_iter=1:30", "train.max_iter", "1:30"),  # no 90; the check refuses it
        ("train.max_iter=5 #", "train.max_iter", "5 #"),
        (f"{RPN}.post_nms_topk=[1e3, 010]", f"{RPN}.post_nms_topk", [1000, 10]),
        (f"{SCHEDULE}.milestones=[1e3,2e3]", f"{SCHEDULE}.milestones", [1000, 2000]),
        (f"{SCHEDULE}.values=[1, 1e-1]", f"{SCHEDULE}.values", [1, 0.1]),
        (f"{RESIZE}.short_edge_length=[1e3]", f"{RESIZE}.short_edge_length", [1000]),
        ("model.pixel_mean=[1e2, 1, .5]", "model.pixel_mean", [100.0, 1, 0.5]),
        ("dataset.test.names=[20231105]", "dataset.test.names", ["20231105"]),
        ("dataset.test.names=[1e3, null, 'a, b']", "dataset.test.names", ["1e3", "null", "a, b"]),
        ("dataset.test.names=[]", "dataset.test.names", []),
        (f"{PROPOSALS}=['OUT #1/test_0.pkl']", PROPOSALS, ["OUT #1/test_0.pkl"]),
        (f"{PROPOSALS}=null", PROPOSALS, None),
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
        (f"{TOPK}.1=7", f"{TOPK}[1]", 7),  # a tuple
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
    found = OmegaConf.select(changed(row, override), re.sub(r"\.(\d+)", r"[\1]", key))
    assert (list(found) if isinstance(value, list) else found) == value
    if isinstance(value, list):
        assert [type(v) for v in found] == [type(v) for v in value]
    else:
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        (f"{RESIZE}.short_edge_length", "[512]", [512]),
        (f"{RESIZE}.short_edge_length", "512", 512),
        (f"{RPN}.anchor_generator.sizes", "[[16],[32]]", [[16], [32]]),
        (f"{RPN}.anchor_generator.sizes.0", "[20]", [20]),
    ],
)
def test_numbers_of_an_interpolation_stay_numbers(key: str, text: str, value: Any) -> None:
    cfg = get_config("table2a_backbone/r50_fpn+ablation", [f"{key}={text}"])
    assert OmegaConf.select(cfg, key) == value


def test_a_list_of_broken_interpolations_can_be_replaced() -> None:
    cfg = get_config("table2a_backbone/r50_fpn+synthetic")
    apply_override(cfg, "dataset.synthetic=null")
    apply_override(cfg, "dataset.train.names=[1e3, b]")
    assert cfg.dataset.train.names == ["1e3", "b"]


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
        ("epochs=3", ["'epochs'", "'train.epochs'"]),
        ("batch_size=3", ["'dataloader.train.total_batch_size'"]),
        ("SOLVER.BASE_LR=0.1", ["'optimizer.lr'"]),
        ("SOLVER.IMS_PER_BATCH=2", ["'dataloader.train.total_batch_size'"]),
        ("SOLVER.MAX_ITER=2", ["'train.max_iter'"]),
        ("MODEL.WEIGHTS=a.pkl", ["'train.init_checkpoint'"]),
        ("num_classes=3", ["'model.roi_heads.num_classes'"]),
        ("device=cpu", ["'train.device'"]),
        ("output_dir=x", ["'train.output_dir'"]),
        ("train.lr=1", ["did you mean 'optimizer.lr'"]),
        ("train.names=[a]", ["did you mean 'dataset.train.names'"]),
        ("max_detections=9", ["did you mean 'dataset.test.max_detections'"]),
        ("dataset.tets.names=[a]", ["did you mean 'dataset.test.names'"]),
        ("DATASETS.TRAIN=[a]", ["did you mean 'dataset.train'"]),
        ("DATASETS.TEST=[a]", ["did you mean 'dataset.test'"]),
        ("num_workers=1", ["did you mean 'dataloader.train.num_workers'"]),
        ("DATALOADER.NUM_WORKERS=1", ["did you mean 'dataloader.train.num_workers'"]),
        ("dataloader.tst.num_workers=1", ["did you mean 'dataloader.test.num_workers'"]),
        ("optimizer.max_iters=1", ["did you mean 'train.max_iter'"]),
        ("model.pixel_std.3=1", ["'model.pixel_std.3'", "['0', '1', '2']"]),
        ("train.max_iter.deeper=1", ["'train.max_iter.deeper'"]),
        ("train.max_iter", ["'train.max_iter'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("train.max_iter=[", ["'train.max_iter=['", "YAML"]),
        ("train.amp={enabled: true, enabled: false}", ["'enabled'", "twice"]),
        (f"{PROPOSALS}=[OUT #1/test_0.pkl]", ["'[OUT #1/test_0.pkl]'", "YAML", "quote"]),
        ("dataset.test.names=[a/b [c]/d]", ["'[a/b [c]/d]'", "YAML", "quote"]),
        ("train.max_iter=${train.eval_period}", ["'${train.eval_period}'"]),
        ("train.output_dir=${oc.env:HOME}", ["'${oc.env:HOME}'"]),
        ("train.ddp.static_graph=true", ["'train.ddp.static_graph'"]),
        ("+dataloader.test.mapper.augmentations.7=1", ["augmentations.7=1"]),
        ("+dataset.train.names.first=a", ["dataset.train.names.first=a"]),
    ],
)
def test_a_wrong_override_is_refused(row: DictConfig, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        changed(row, override)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", _OTHER_NAMES)
def test_what_a_key_is_called_elsewhere_is_understood(row: DictConfig, name: str) -> None:
    key = _OTHER_NAMES[name]
    with pytest.raises(ConfigError, match=f"did you mean '{re.escape(key)}'"):
        changed(row, f"SOLVER.{name.upper()}=1")
    changed(row, f"{key}=1")


@pytest.mark.parametrize(
    "name",
    [
        *("SOLVER.WARMUP_ITERS", "SOLVER.GAMMA", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST"),
        *("max_epochs", "iters", "fp16", "bf16", "train.fp16"),
    ],
)
def test_names_that_are_known(row: DictConfig, name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean '(train|dataloader|lr_multiplier)"):
        changed(row, f"{name}=1")


@pytest.mark.parametrize("key", ["train.nothing", "train.max_iter.deeper", "TRAIN.XYZ"])
def test_no_node_above_is_meant(row: DictConfig, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        changed(row, f"{key}=1")
    assert "did you mean" not in str(error.value)


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3", 3), ("true", True), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ("", None)),
        *(("'a #b'", "a #b"), ("['a #b']", ["a #b"]), ("a#b", "a#b")),
        # YAML would drop a part of these
        *(("a #b", "a #b"), ("#b", "#b"), ("5 #b", "5 #b"), ("[1] #b", "[1] #b"), ("&a", "&a")),
        *(("&a b", "&a b"), ("!!str 5", "!!str 5")),
    ],
)
def test_a_new_key_holds_all_that_is_given(row: DictConfig, text: str, value: Any) -> None:
    assert OmegaConf.to_container(changed(row, f"+mine={text}"))["mine"] == value


def test_a_plus_sets_a_new_key() -> None:
    overrides = ["+train.ddp.static_graph=true", "+mine.depth=3", "+dataloader.extra=1"]
    cfg = get_config("table2a_backbone/r50_fpn", overrides)
    assert (cfg.train.ddp.static_graph, cfg.mine.depth, cfg.dataloader.extra) == (True, 3, 1)
