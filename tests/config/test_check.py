"""A config that does not fit is refused before anything is built, in a line that names the key."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config.check import check_config, fits, signature_of
from mask_rcnn_plugin.config.overrides import apply_override
from mask_rcnn_plugin.errors import ConfigError

BASE = "table2a_backbone/r50_fpn"
ROWS = (BASE, "table2a_backbone/r50_c4", "table3_box/faster_rcnn_r101_fpn")
NODES = "model, dataset, dataloader, optimizer, lr_multiplier, train"
METRIC, STOP = "train.best_metric", "train.early_stopping"
TASKS = "dataloader.evaluator.tasks"


@pytest.fixture(scope="module")
def rows() -> dict[str, DictConfig]:
    return {name: get_config(name) for name in (*ROWS, "table5_multitask/keypoint_only")}


@pytest.fixture
def check(rows: dict[str, DictConfig]) -> Callable[..., None]:
    """Check a row with overrides, as `get_config` does."""

    def with_overrides(name: str, *overrides: str) -> None:
        cfg = OmegaConf.create(rows[name], flags={"allow_objects": True})
        added = [key for override in overrides for key in apply_override(cfg, override)]
        check_config(cfg, added)

    return with_overrides


@pytest.fixture
def refused(check: Callable[..., None]) -> Callable[..., str]:
    def message(name: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            check(name, *overrides)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


@pytest.fixture
def own_file(tmp_path: Path) -> Callable[..., str]:
    """A user's file: a config of the plugin's with some lines more."""

    def write(*lines: str) -> str:
        file = tmp_path / "mine.py"
        start = (
            "from mask_rcnn_plugin import get_config",
            f"_base = get_config({BASE!r})",
            f"{NODES} = (_base[k] for k in {NODES!r}.split(', '))",
            "train.output_dir = ''",
        )
        file.write_text("\n".join([*start, *lines]))
        return str(file)

    return write


@pytest.mark.parametrize(
    "override",
    [
        *("train.max_iter=1.5", "train.max_iter=-3", "train.max_iter=.inf", "train.max_iter=abc"),
        *("train.max_iter=null", f"train.max_iter={2**63}", "train.log_period=0"),
        *(f"{STOP}.metric=5", f"{STOP}.patience=0", f"{STOP}.min_delta=-1", f"{STOP}=5"),
        *("train.ema=5", "train.ema.enabled=maybe", "train.ema.decay=1"),
        *("train.loggers=wandb", "train.loggers=[wandb, w_and_b]", "train.loggers=null"),
        *("train.eval_period=-1", "train.checkpointer.period=0", "train.checkpointer.period=x"),
        *("train.checkpointer.max_to_keep=0", "train.checkpointer.max_to_keep=all"),
        *("train.amp=null", "train.amp.enabled=3", "train.amp.enabled=maybe", "train.amp.dtype="),
        *("train.amp.dtype=foo", "train.channels_last=maybe", "train=null", "train=5"),
        *("train.reference_batch_size=abc", "train.reference_batch_size=0.5"),
        *("train.accumulate_steps=0", "train.max_skipped_steps=-1", "train.validation_period=-1"),
        *("train.process_group_timeout=0", "train.seed=0.5", "train.seed=4294967296"),
        *("train.device=cudaa", "train.device=cuda:x", "train.device=meta"),
        *("optimizer.lr=-0.1", "optimizer.lr=.nan", "optimizer.lr=.inf", "optimizer.lr=[1]"),
        *("optimizer.momentum=1", "optimizer.momentum=-0.1", "optimizer.weight_decay=-1"),
        *("optimizer.lr=null", "optimizer.weight_decay=null", "optimizer.momentum=null"),
        *("optimizer.nesterov=3", "optimizer.lr={a: 1}", "optimizer=3", "model=null"),
        *("lr_multiplier.warmup_length=-1", "lr_multiplier.warmup_length.iterations=-1"),
        *("model.roi_heads.num_classes=0", "model.roi_heads.num_classes=1.5"),
        "model.roi_heads.positive_fraction=1.5",
        "model.roi_heads.batch_size_per_image=0",
        "model.roi_heads.proposal_matcher.thresholds=[-0.5]",
        "model.roi_heads.mask_pooler.sampling_ratio=-1",
        "model.roi_heads.mask_pooler.output_size=0",
        "model.roi_heads.mask_head.loss_weight=-1",
        "model.roi_heads.mask_head.conv_dims=[[256]]",
        "model.roi_heads.box_predictor.test_score_thresh=2",
        "dataloader.train.repeat_threshold=1.5",
        "dataloader.train.repeat_threshold=-0.1",
        *("model.proposal_generator.nms_thresh=-0.1", "model.proposal_generator.nms_thresh=null"),
        *(
            "model.proposal_generator.pre_nms_topk=[0, 1]",
            "model.proposal_generator.pre_nms_topk=9",
        ),
        *(f"model.roi_heads.mask_pooler.{key}=foo" for key in ("pooler_type", "aggregation")),
        *("model.pixel_mean=[a, b, c]", "dataset.train.names=a", "dataset.train.names={a: 1}"),
        *("dataset.test.max_detections=0", "dataset.synthetic={size: 3}"),
        *("dataloader.train.total_batch_size=0", "dataloader.test.num_workers=-1"),
        "dataloader.train.mapper.augmentations.0.max_size=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[640, -800]",
        *(f"{TASKS}=segm", f"{TASKS}=[bbox, seg]", f"{TASKS}=null", "dataloader.train.mapper=null"),
        *("dataloader.evaluator=null", "train.ddp=3"),
        # which others refer to
        *("dataset.test.names=coco_2017_val", "dataset.train.names=coco_2017_train", "train=3"),
        *("dataset.test=x", "model.roi_heads=5", "dataset.synthetic=5"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(refused: Any, override: str) -> None:
    key = re.escape(override.partition("=")[0])
    assert re.match(rf"(override '{key}=|{key}(\.\d)? (is|lacks) )", refused(BASE, override))


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("train.amp=true", ["enabled", "dtype"]),
        ("train.amp=null", ["enabled", "dtype"]),
        ("train.checkpointer=5", ["period", "max_to_keep"]),
        ("dataset.synthetic=5", ["root", "train", "val", "size", "seed"]),
        ("train.checkpointer={period: 3, max: 2}", ["period", "max_to_keep"]),
    ],
)
def test_a_node_of_the_wrong_kind_is_told_its_keys(
    refused: Any, override: str, keys: list[str]
) -> None:
    message = refused(BASE, override)
    for key in keys:
        assert repr(key) in message
    for name in ("Amp", "Checkpointer", "Synthetic"):
        assert name not in message


def test_a_range_of_one_size_is_refused_by_its_key(refused: Any) -> None:
    key = "dataloader.train.mapper.augmentations.0.short_edge_length"
    style = "dataloader.train.mapper.augmentations.0.sample_style=range"
    assert refused(BASE, style).startswith(f"{key} is [800], must be two values")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("+train=5", "train"),
        ("+optimizer.nestrov=true", "'optimizer.nesterov'"),
        ("+optimizer.nesterov=abc", "optimizer.nesterov"),
        ("+train.checkpointer.max_to_keep=all", "train.checkpointer.max_to_keep"),
    ],
)
def test_a_plus_sets_nothing_that_cannot_be(refused: Any, override: str, part: str) -> None:
    assert part in refused(BASE, override)


@pytest.mark.parametrize(
    "override",
    [
        *("train.checkpointer.max_to_keep=null", "+train.checkpointer.max_to_keep=null"),
        *("train.device=cuda:7", "train.amp.dtype=auto", "train.channels_last=auto"),
        *("train.init_checkpoint=", "dataset.synthetic=null", "train.process_group_timeout=5"),
        *("model.proposal_generator=null", "dataset.train.json=20231105", "optimizer.lr=1"),
    ],
)
def test_a_right_value_is_taken(check: Any, override: str) -> None:
    check(BASE, override)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train.max_iters = 10", ["'train.max_iters'", "'train.max_iter'"]),
        ("train.checkpointer.peroid = 1", ["'train.checkpointer.period'"]),
        ("dataset.tets = {'json': 'a'}", ["'dataset.test'"]),
        ("dataloader.trian = 1", ["'dataloader.train'"]),
        ("optimiser = {'lr': 3}", ["'optimiser'", "'optimizer'"]),
        ("optimizer.nestrov = True", ["'optimizer.nesterov'"]),
        ("model.roi_heads.num_clases = 3", ["'model.roi_heads.num_classes'"]),
        ("train.max_iter = 'abc'", ["train.max_iter", "'abc'", "int"]),
        ("train.max_iter = '10'", ["train.max_iter", "'10'", "int"]),
        ("train.amp.enabled = 'false'", ["train.amp.enabled", "'false'", "bool"]),
        ("train.amp = True", ["train.amp", "True"]),
        ("del train['amp'], train['seed']", ["train", "'amp'", "'seed'"]),
        ("del train.checkpointer['period']", ["train.checkpointer", "'period'"]),
        ("del optimizer['params']", ["optimizer", "'params'", "SGD"]),
        ("model.backbone.name = ['a']", ["model.backbone.name", "['a']", "str"]),
        ("model.roi_heads.mask_head.conv_dims = 3", ["conv_dims", "Sequence[int]"]),
        ("model.roi_heads.box_predictor.num_classes = None", ["num_classes", "int"]),
        ("optimizer = {'lr': 3}", ["optimizer", "_target_"]),
        ("del dataloader['test']", ["dataloader", "'test'"]),
        ("model.backbone._target_ = 5", ["model.backbone._target_", "5"]),
        (
            "model.backbone._target_ = 'mask_rcnn_plugin.modeling.resnet_backbon'",
            ["model.backbone._target_", "'mask_rcnn_plugin.modeling.resnet_backbone'"],
        ),
        ("train.max_iter = '${train.max_iters}'", ["'train.max_iters'"]),
        ("train.amp = '${train.half}'", ["train.amp", "'train.half'"]),
        ("1 / 0", ["ZeroDivisionError", "{file}, line 5"]),
        ("train['nothing']", ["{file}, line 5", "nothing"]),
        ("import nothing_of_the_kind", ["ModuleNotFoundError", "{file}, line 5"]),
        ("from .nothing import model", ["ImportError", "{file}, line 5"]),
        ("def f(:", ["{file}", "Line 5"]),
    ],
)
def test_a_wrong_line_of_a_file_is_refused(own_file: Any, line: str, parts: list[str]) -> None:
    file = own_file(line)
    with pytest.raises(ConfigError) as error:
        get_config(file)
    message = str(error.value)
    assert "\n" not in message
    for part in (file, *parts):
        assert part.replace("{file}", file) in message


@pytest.mark.parametrize(
    "line",
    [
        "",
        "_helper = {'a': 3}; train.max_iter = _helper['a']",
        "widths = {'a': 3}; model.roi_heads.mask_head.conv_dims = ['${widths.a}']",
        "optimizer.lr = 1; optimizer.nesterov = True",
        "train.init_checkpoint = None; dataset.synthetic = None; train.amp = {**train.amp}",
        "import torch; optimizer._target_ = torch.optim.Adagrad; del optimizer['momentum']",
        "optimizer._target_ = 'torch.optim.SGD'",
        "model.roi_heads.mask_head.input_shape = object()",
        "import torch; model.roi_heads.mask_head.conv_norm = torch.nn.BatchNorm2d",
        "model.backbone.norm = model.backbone.fpn_norm = lambda channels: None",
        "import detectron2.data.transforms as T; from detectron2.config import LazyCall as L; "
        "dataloader.train.mapper.augmentations.insert("
        "0, L(T.RandomCrop)(crop_type='relative_range', crop_size=[0.9, 0.9]))",
    ],
)
def test_an_own_file_that_fits_is_taken(own_file: Any, line: str) -> None:
    assert get_config(own_file(line)).train.output_dir == "output/mine"


@pytest.mark.parametrize(
    ("config", "override", "task", "head"),
    [
        (BASE, "model.roi_heads.mask_head=null", "segm", "mask_head"),
        ("table2a_backbone/r50_c4", "model.roi_heads.mask_head=null", "segm", "mask_head"),
        ("table3_box/faster_rcnn_r101_fpn", f"{TASKS}=[bbox, segm]", "segm", "mask_head"),
        (BASE, f"{TASKS}=[bbox, keypoints]", "keypoints", "keypoint_head"),
    ],
)
def test_a_task_without_its_branch_is_refused(
    refused: Any, config: str, override: str, task: str, head: str
) -> None:
    message = refused(config, override)
    assert repr(task) in message
    assert f"model.roi_heads.{head}" in message


def test_a_branch_that_is_not_scored_is_taken(check: Any) -> None:
    overrides = ["model.roi_heads.mask_head=null", f"{TASKS}=[bbox]"]
    check(BASE, *overrides)
    check(BASE, overrides[1])


@pytest.mark.parametrize(
    "metric", ["segm/APP", "segm/ap", "segm", "keypoints/AP", "bbox/AR@100", "5"]
)
def test_a_metric_that_no_evaluation_gives_is_refused(refused: Any, metric: str) -> None:
    for key in (METRIC, f"{STOP}.metric"):
        message = refused(BASE, f"{key}={metric}")
        assert key in message
        assert repr(metric) in message


@pytest.mark.parametrize("metric", ["segm/AP", "bbox/APs", "segm/AP-person", "null", ""])
def test_a_metric_of_the_evaluation_is_taken(check: Any, metric: str) -> None:
    check(BASE, f"{METRIC}={metric}", f"{STOP}.metric={metric}")


def test_early_stopping_needs_evaluations(check: Any, refused: Any) -> None:
    overrides = [f"{STOP}.metric=segm/AP", "train.eval_period=0"]
    assert "train.eval_period" in refused(BASE, *overrides)
    check(BASE, *overrides, "train.epochs=2")
    check(BASE, *overrides, f"{STOP}=null")


def test_the_loggers_are_named(refused: Any) -> None:
    message = refused(BASE, "train.loggers=[json, w_and_b]")
    assert all(repr(name) in message for name in ("json", "tensorboard", "wandb", "mlflow"))


def test_the_config_of_an_older_training_is_taken(own_file: Any) -> None:
    get_config(
        own_file("for key in ('early_stopping', 'ema', 'epochs', 'loggers'):", "    del train[key]")
    )


def test_metrics_of_keypoints_and_proposals(check: Any, refused: Any) -> None:
    keypoints = "table5_multitask/keypoint_only"
    check(keypoints, f"{METRIC}=keypoints/APm")
    assert "keypoints/APs" in refused(keypoints, f"{METRIC}=keypoints/APs")
    check(BASE, f"{TASKS}=[box_proposals]", f"{METRIC}=box_proposals/ARs@1000")
    assert METRIC in refused(BASE, f"{TASKS}=[box_proposals]", f"{METRIC}=box_proposals/AP")


@pytest.mark.parametrize(
    "key",
    [
        "model.roi_heads.box_predictor.test_topk_per_image",
        "dataloader.evaluator.max_detections",
    ],
)
def test_a_second_limit_of_detections_is_refused(check: Any, refused: Any, key: str) -> None:
    message = refused(BASE, f"{key}=50")
    assert f"{key} is 50" in message
    assert "dataset.test.max_detections is 100" in message
    check(BASE, f"{key}=50", "dataset.test.max_detections=50")


def test_nothing_is_asked_of_what_is_not_the_plugins(own_file: Any) -> None:
    file = own_file(
        "from detectron2.config import LazyCall as L",
        "from detectron2.modeling.roi_heads import StandardROIHeads",
        "from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator",
        "class Heads(StandardROIHeads):",
        "    __module__ = 'mine'",
        "    def __init__(self, my_branch, **kwargs): ...",
        "class Evaluator(MaskRCNNCOCOEvaluator):",
        "    __module__ = 'mine'",
        "model.roi_heads = L(Heads)(my_branch=1)",
        "dataloader.evaluator._target_ = Evaluator",
        "train.best_metric = 'segm/boundary'",
    )
    get_config(file, ["dataset.test.max_detections=80"])


class Base(nn.Module):
    def __init__(self, a: int, b: "list[float]" = [1.0]) -> None:  # noqa: B006
        super().__init__()


class Passing(Base):
    def __init__(self, c: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def keeping(a: int, **kwargs: Any) -> None:
    pass


def test_a_signature_has_the_arguments_that_are_passed_on() -> None:
    names, required, is_open = signature_of(Passing)  # type: ignore[misc]
    assert (set(names), required, is_open) == ({"a", "b", "c"}, set(), False)
    assert signature_of(Base).required == {"a"}  # type: ignore[union-attr]
    assert signature_of(keeping).is_open  # type: ignore[union-attr]
    assert set(signature_of("torch.nn.Linear").hints) > {"bias"}  # type: ignore[union-attr]
    assert signature_of("nowhere.Nothing") is signature_of(3) is None


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (1.0, int, False),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (True, float, False),
        (None, int, False),
        (None, int | None, True),
        (None, nn.Module, True),
        (None, float | torch.Tensor, False),
        (None, Any, True),
        (None, object, True),
        (None, list[int], False),
        (None, Callable[[int], int], False),
        ([1, 2, 3], tuple[float], True),
        ([1, "a"], list[int], False),
        ("abc", list[str], False),
        ({"_target_": dict}, int, True),
        ({"a": 1}, float | dict[str, float], True),
        (nn.ReLU, str | Callable[[int], nn.Module], True),
        (3, str | Callable[[int], nn.Module], False),
        (3, Path, True),  # in doubt
    ],
)
def test_values_and_type_hints(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) == expected
