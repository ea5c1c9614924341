"""A config that does not fit is refused before anything is built, in one line that says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config.call_signature import fits, signature_of
from mask_rcnn_plugin.errors import ConfigError

BASE = "table2a_backbone/r50_fpn"
NODES = "model, dataset, dataloader, optimizer, lr_multiplier, train"


def refused(config: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        get_config(config, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def own_file(tmp_path: Path) -> Any:
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
        *(
            "train.max_iter=1.5",
            "train.max_iter=-3",
            "train.max_iter=.inf",
            f"train.max_iter={2**63}",
        ),
        *("train.eval_period=-1", "train.log_period=0", "train.checkpointer.period=0"),
        *("train.checkpointer.max_to_keep=0", "train.seed=0.5", "train.amp=null"),
        *("train.reference_batch_size=abc", "train.reference_batch_size=0.5"),
        *("train.accumulate_steps=0", "train.max_skipped_steps=-1", "train.validation_period=-1"),
        "train.process_group_timeout=0",
        *("train.device=cudaa", "train.device=cuda:99", "train.device=meta"),
        *("train.amp.dtype=foo", "train.amp.dtype="),
        *("optimizer.lr=-0.1", "optimizer.lr=.nan", "optimizer.lr=.inf", "optimizer.lr=[1]"),
        *("optimizer.momentum=1", "optimizer.momentum=-0.1", "optimizer.weight_decay=-1"),
        *("optimizer.nesterov=3", "lr_multiplier.warmup_length=-1"),
        *("model.roi_heads.num_classes=0", "model.roi_heads.num_classes=1.5"),
        "model.roi_heads.positive_fraction=1.5",
        "model.roi_heads.batch_size_per_image=0",
        "model.roi_heads.proposal_matcher.thresholds=[-0.5]",
        "model.roi_heads.mask_pooler.sampling_ratio=-1",
        "model.roi_heads.mask_pooler.output_size=0",
        "model.roi_heads.mask_head.loss_weight=-1",
        "model.roi_heads.mask_head.conv_dims=[256, 0]",
        "model.roi_heads.mask_head.conv_dims=[256, -1]",
        "model.roi_heads.mask_head.conv_norm=3",
        "model.proposal_generator.head.conv_dims=[-1, 0]",
        "model.roi_heads.mask_head.conv_dims=[[256]]",
        "model.roi_heads.box_predictor.test_score_thresh=2",
        "model.proposal_generator.nms_thresh=-0.1",
        "model.proposal_generator.pre_nms_topk=[0, 1]",
        *("model.backbone.freeze_at=6", "model.backbone.norm=XX", "model.backbone.fpn_norm=bn"),
        *(f"model.roi_heads.mask_pooler.{key}=foo" for key in ("pooler_type", "aggregation")),
        *(
            "model.pixel_mean=[a, b, c]",
            "model.pixel_mean=[1, 2, .nan]",
            "model.pixel_std=[1, 1, 0]",
        ),
        *("dataset.train.names=[1]", "dataset.train.names=a", "dataset.test.max_detections=0"),
        *("dataloader.train.total_batch_size=0", "dataloader.test.num_workers=-1"),
        "dataloader.train.mapper.augmentations.0.max_size=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[640, -800]",
        *("dataloader.evaluator.tasks=segm", "dataloader.evaluator.tasks=[bbox, seg]"),
        *("dataloader.evaluator.tasks=null", "dataloader.train.mapper=null"),
        "dataloader.test.mapper.augmentations=[1]",
        *("train=null", "train.seed=4294967296"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(override: str) -> None:
    assert override.partition("=")[0] in refused(BASE, override)


def test_gpus_that_are_not_there_are_counted() -> None:
    n = torch.cuda.device_count()
    message = refused(BASE, f"train.device=cuda:{n}")
    assert f"train.device is 'cuda:{n}', but this machine has {n} GPUs" in message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("train.max_iters = 10", "no key 'train.max_iters'; did you mean 'train.max_iter'?"),
        ("train.checkpointer.peroid = 1", "did you mean 'train.checkpointer.period'?"),
        ("dataset.tets = {'json': 'a'}", "did you mean 'dataset.test'?"),
        ("dataloader.trian = 1", "did you mean 'dataloader.train'?"),
        ("optimiser = {'lr': 3}", "no key 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer.nestrov = True", "did you mean 'optimizer.nesterov'? "),
        ("model.roi_heads.num_clases = 3", "did you mean 'model.roi_heads.num_classes'? "),
        ("train.max_iter = 'abc'", "train.max_iter is 'abc', must be an integer from 1 to 2**63"),
        ("train.seed = 'abc'", "train.seed is 'abc', must be an integer below 2**31"),
        ("train.amp = True", "train.amp is True, must be a dict, such as {'enabled'"),
        ("del train['amp'], train['seed']", "train lacks ['seed', 'amp']"),
        ("del optimizer['params']", "optimizer lacks ['params'], which SGD needs"),
        ("model.backbone.name = ['a']", "model.backbone.name is ['a'], must be of type str"),
        ("model.roi_heads.mask_head.conv_dims = 3", "must be of type Sequence[int]"),
        ("model.roi_heads.box_predictor.num_classes = None", "must be of type int"),
        ("optimizer = {'lr': 3}", "optimizer calls nothing: it needs a _target_"),
        ("model.backbone._target_ = 5", "model.backbone._target_ is 5, must be a class"),
        (
            "model.backbone._target_ = 'mask_rcnn_plugin.modeling.resnet_backbon'",
            "did you mean 'mask_rcnn_plugin.modeling.resnet_backbone'?",
        ),
        ("train.max_iter = '${train.max_iters}'", "'train.max_iters' not found"),
        ("1 / 0", "ZeroDivisionError in {file}, line 5: division by zero"),
        ("train['nothing']", "ConfigKeyError in {file}, line 5: Missing key nothing"),
        ("import nothing_of_the_kind", "ModuleNotFoundError in {file}, line 5: "),
        ("from .nothing import model", "ImportError in {file}, line 5: "),
        ("def f(:", "{file} has syntax error! Line 5: invalid syntax"),
    ],
)
def test_a_wrong_line_of_a_file_is_refused(own_file: Any, line: str, part: str) -> None:
    file = own_file(line)
    message = refused(file)
    assert message.startswith(f"config {file}: ")
    assert part.replace("{file}", file) in message


@pytest.mark.parametrize(
    "line",
    [
        "",
        "_helper = {'a': 3}; train.max_iter = _helper['a']",
        "widths = {'a': 3}; model.roi_heads.mask_head.conv_dims = ['${widths.a}']",
        "optimizer.lr = 1; optimizer.nesterov = True",
        "train.init_checkpoint = None; dataset.synthetic = None",
        "import torch; optimizer._target_ = torch.optim.Adagrad; del optimizer['momentum']",
        "optimizer._target_ = 'torch.optim.SGD'",
        "model.roi_heads.mask_head.input_shape = object()",
        "train.checkpointer.max_to_keep = None",
        "model.proposal_generator.head.conv_dims = [-1, -1]",
        "import torch; model.roi_heads.mask_head.conv_norm = torch.nn.BatchNorm2d",
        "model.backbone.norm = model.backbone.fpn_norm = lambda channels: None",
        "import detectron2.data.transforms as T; from detectron2.config import LazyCall as L; "
        "dataloader.train.mapper.augmentations.insert("
        "0, L(T.RandomCrop)(crop_type='relative_range', crop_size=[0.9, 0.9]))",
    ],
)
def test_an_own_file_that_fits_is_taken(own_file: Any, line: str) -> None:
    assert get_config(own_file(line)).train.output_dir == "output/mine"


@pytest.mark.parametrize("plus", ["", "+"])
def test_null_keeps_all_checkpoints(plus: str) -> None:
    cfg = get_config(BASE, [f"{plus}train.checkpointer.max_to_keep=null"])
    assert cfg.train.checkpointer.max_to_keep is None
    assert "train.checkpointer.max_to_keep" in refused(
        BASE, f"{plus}train.checkpointer.max_to_keep=all"
    )


def test_a_plus_sets_a_new_key() -> None:
    overrides = ["+train.ddp.static_graph=true", "+mine.depth=3"]
    cfg = get_config(BASE, overrides)
    assert (cfg.train.ddp.static_graph, cfg.mine.depth) == (True, 3)
    assert "'train.ddp.static_graph'" in refused(BASE, "train.ddp.static_graph=true")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("+train=5", "'train'"),
        ("+optimizer.nestrov=true", "did you mean 'optimizer.nesterov'?"),
        ("+optimizer.nesterov=abc", "optimizer.nesterov is 'abc', must be of type bool"),
        ("+dataloader.test.mapper.augmentations.7=1", "augmentations.7=1': list index out"),
    ],
)
def test_a_plus_sets_nothing_that_cannot_be(override: str, part: str) -> None:
    assert part in refused(BASE, override).replace("`", "'")


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
        (None, list[int], False),
        (None, Callable[[int], int], False),
        ("a", float | torch.Tensor, False),
        ([1, 2, 3], tuple[float], True),
        ([1, "a"], list[int], False),
        ("abc", list[str], False),
        ({"_target_": dict}, int, True),
        ({"a": 1}, float | dict[str, float], True),
        (3, nn.Module, False),
        (nn.ReLU, str | Callable[[int], nn.Module], True),
        (3, str | Callable[[int], nn.Module], False),
        (3, Path, True),  # in doubt
    ],
)
def test_values_and_type_hints(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) == expected
