"""The overlays `lsj` and `lsj_100ep` beside detectron2's own config of that training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError, list_configs
from mask_rcnn_plugin.training import setup_datasets

OURS = "table2a_backbone/r50_fpn+lsj_100ep+zoo_fpn"
NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# Keys of detectron2's that have another name here, with the same value.
_STEM, _STAGES = "model.backbone.bottom_up.stem", "model.backbone.bottom_up.stages"
RENAMED = {
    "model.backbone.bottom_up.freeze_at": "model.backbone.freeze_at",
    f"{_STEM}.norm": "model.backbone.norm",
    f"{_STAGES}.norm": "model.backbone.norm",
    f"{_STAGES}.stride_in_1x1": "model.backbone.stride_in_1x1",
    f"{_STEM}.out_channels": "model.backbone.width",
    "model.backbone.out_channels": "model.backbone.fpn_channels",
    "model.backbone.norm": "model.backbone.fpn_norm",
    **{
        f"model.roi_heads.{head}.input_shape.{index}": f"model.roi_heads.{head}.input_shape.{name}"
        for head in ("box_head", "mask_head")
        for index, name in enumerate(("channels", "height", "width"))
    },
    "model.roi_heads.box_predictor.input_shape.0": (
        "model.roi_heads.box_predictor.input_shape.channels"
    ),
    "lr_multiplier.scheduler.num_updates": "lr_multiplier.scheduler.milestones.2",
}
# What is not the same, and why.
DELIBERATE = {
    # "ResNet-50-FPN" says them.
    f"{_STEM}.in_channels": 3,
    f"{_STAGES}.depth": 50,
    **{f"model.backbone.bottom_up.out_features.{i}": f"res{i + 2}" for i in range(4)},
    **{f"model.backbone.in_features.{i}": f"res{i + 2}" for i in range(4)},
    # detectron2's name of what is the paper's RoIAlign.
    "model.roi_heads.box_pooler.pooler_type": "ROIAlignV2",
    "model.roi_heads.mask_pooler.pooler_type": "ROIAlignV2",
    # Tested below: a string stands for the function, and a length in iterations for the part.
    "model.roi_heads.box_head.conv_norm": None,
    "model.roi_heads.mask_head.conv_norm": None,
    "lr_multiplier.warmup_length": 500 / 184_375,
    # The row's: the paper's splits, how often to evaluate and what to keep.
    "dataloader.train.dataset.names": "coco_2017_train",
    "dataloader.test.dataset.names": "coco_2017_val",
    "dataloader.evaluator.dataset_name": "coco_2017_val",
    "train.eval_period": 5000,
    "train.checkpointer.max_to_keep": 100,
    "train.output_dir": "./output",
}
# What the row states and detectron2 leaves at a default: its L1 loss, which the paper has smooth,
# and half precision in fp16, which is the same.
NOT_THE_DEFAULT = {
    "model.proposal_generator.smooth_l1_beta": 1 / 9,
    "model.roi_heads.box_predictor.smooth_l1_beta": 1.0,
    "train.amp.dtype": "fp16",
}


def flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for n, x in items for k, v in flat(x, f"{key}.{n}".lstrip(".")).items()}
    return {key: value}


@pytest.fixture(scope="module")
def baseline() -> Any:
    try:
        file = model_zoo.get_config_file("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    except RuntimeError:
        pytest.skip("detectron2 is installed without the configs of its model zoo")
    cfg = LazyConfig.load(file)
    return OmegaConf.create({k: cfg[k] for k in NODES}, flags={"allow_objects": True})


@pytest.fixture(scope="module")
def models(baseline: Any) -> list[Any]:
    with torch.device("meta"):
        return [instantiate(cfg.model) for cfg in (baseline, get_config(OURS))]


def test_every_setting_of_the_baseline_is_equal_or_named(baseline: Any) -> None:
    theirs = flat(OmegaConf.to_container(baseline, resolve=True))
    ours = flat(OmegaConf.to_container(get_config(OURS), resolve=True))
    missing = object()
    found = {
        key: value
        for key, value in theirs.items()
        if not key.endswith("._target_") and ours.get(RENAMED.get(key, key), missing) != value
    }
    shapes = {k for k in found if ".input_shape." in k and found[k] is None}  # a stride, of none
    assert found.keys() - shapes == DELIBERATE.keys()
    for key, value in DELIBERATE.items():
        assert value is None or found[key] == value, key
    for key, value in NOT_THE_DEFAULT.items():
        assert key not in theirs
        assert ours[key] == value


def test_classes_are_the_baselines_or_made_for_their_place(baseline: Any) -> None:
    theirs, ours = (flat(OmegaConf.to_container(c)) for c in (baseline, get_config(OURS)))
    for key in theirs.keys() & ours.keys():
        if key.endswith("._target_") and isinstance(theirs[key], type):
            base, made = theirs[key], ours[key]
            assert not isinstance(made, type) or issubclass(made, base), key


def test_parameters_and_normalisation_are_the_baselines(models: list[Any]) -> None:
    theirs, ours = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert ours == theirs
    theirs, ours = (
        {
            name: (type(module), getattr(module, "_stats_mode", None))
            for name, module in model.named_modules()
            if "Norm" in type(module).__name__
        }
        for model in models
    )
    assert len(ours) == 53 + 8 + 4 + 4  # ResNet, FPN, box head, mask head
    assert ours == theirs


def test_the_learning_rate_is_the_baselines(baseline: Any) -> None:
    theirs, ours = (instantiate(cfg.lr_multiplier) for cfg in (baseline, get_config(OURS)))
    for step in (0, 1, 250, 499, 500, 501, 163_888, 163_889, 177_545, 177_546, 184_374):
        assert ours(step / 184_375) == pytest.approx(theirs(step / 184_375), rel=1e-9), step


@pytest.mark.parametrize("row", list_configs())
def test_every_row_takes_the_overlay(row: str) -> None:
    cfg = get_config(f"{row}+lsj_100ep", ["lsj.size=640"])
    resize, crop, _ = cfg.dataloader.train.mapper.augmentations
    assert (resize.target_height, resize.target_width) == (640, 640)
    assert list(crop.crop_size) == [640, 640]
    masks = "mask_head" in cfg.model.roi_heads
    assert cfg.dataloader.train.mapper.recompute_boxes is masks
    assert cfg.model.backbone.norm == "SyncBN"


@pytest.mark.parametrize(
    "row",
    [
        *("table2a_backbone/r50_c4", "table2d_stride32/roialign", "table2e_mask_branch/mlp_2fc"),
        "table5_multitask/keypoint_and_mask",
    ],
)
def test_every_kind_of_row_trains_a_step(row: str, toy_overrides: list[str]) -> None:
    cfg = get_config(f"{row}+lsj_100ep+synthetic", toy_overrides)
    setup_datasets(cfg)
    model = instantiate(cfg.model)
    with EventStorage():
        losses = model(next(iter(instantiate(cfg.dataloader.train))))
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("+lsj", 1024), ("+finetune+lsj", 1024), ("+lsj+finetune", 1024)),
        *(("+synthetic+lsj", 128), ("+lsj+synthetic", 128), ("+ablation+lsj", 192)),
    ],
)
def test_images_are_as_large_as_drawn_ones(name: str, size: int) -> None:
    cfg = get_config(f"table2a_backbone/r50_fpn{name}")
    assert cfg.dataloader.train.mapper.augmentations[0].target_height == size


def test_the_augmentations_alone_leave_the_training_as_it_is() -> None:
    row, with_lsj = (
        flat(OmegaConf.to_container(get_config(f"table2a_backbone/r50_fpn{o}"), resolve=True))
        for o in ("", "+lsj")
    )
    changed = {k for k in row.keys() | with_lsj.keys() if row.get(k) != with_lsj.get(k)}
    data = ("dataloader.train.mapper.", "lsj.", "source.", "train.output_dir")
    assert {k for k in changed if not k.startswith(data)} == {"dataloader.evaluator.output_dir"}


@pytest.mark.parametrize("value", ["0", "64.5", "[64, 64]"])
def test_a_size_is_checked(value: str) -> None:
    with pytest.raises(ConfigError, match=r"lsj\.size is"):
        get_config("table2a_backbone/r50_fpn+lsj", [f"lsj.size={value}"])


def test_drawn_images_come_after_the_baselines_training() -> None:
    with pytest.raises(ConfigError, match=r"lsj_100ep.*\+synthetic"):
        get_config("table2a_backbone/r50_fpn+synthetic+lsj_100ep")


def test_a_config_goes_through_a_file(tmp_path: Path) -> None:
    cfg = get_config("table2a_backbone/r50_fpn+lsj_100ep")
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = get_config(str(tmp_path / "config.yaml"), ["lsj.size=512"])
    assert again.dataloader.train.mapper.augmentations[1].crop_size == [512, 512]
    assert again.model.roi_heads.mask_head.conv_norm == "naiveSyncBN_N"
