"""Configs: found, loaded, overridden strictly; each builds, trains a step and predicts."""

import ast
import functools
import itertools
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from mask_rcnn_plugin import add_mask_rcnn_config, get_config, list_configs
from mask_rcnn_plugin.config import CONFIG_DIR, ConfigError, flatten, list_overlays
from mask_rcnn_plugin.config.loading import base_name
from mask_rcnn_plugin.config.paper import ROWS, row_of
from mask_rcnn_plugin.modeling import MaskRCNNMLPHead
from mask_rcnn_plugin.training import setup_datasets

CONFIGS = [name for name in list_configs() if not name.startswith("backbones/")]  # the paper's

NEEDS_TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")

ADDED, REMOVED = "added", "removed"  # a node, with all that is below it


def _test_split(*names: str) -> dict[str, Any]:
    return {
        "dataset.test.names": list(names),
        "dataloader.evaluator.dataset_name": list(names),
        "dataloader.test.dataset.names": list(names),
        "train.eval_period": 0,
    }


def _branch(name: str, state: str) -> dict[str, Any]:
    return {f"model.roi_heads.{name}_{part}": state for part in ("head", "in_features", "pooler")}


def _masks(*tasks: str) -> dict[str, Any]:
    return {
        "dataloader.evaluator.tasks": list(tasks),
        "dataloader.train.mapper.use_instance_mask": "segm" in tasks,
        **_branch("mask", ADDED if "segm" in tasks else REMOVED),
    }


def _pooler(*branches: str, **values: str) -> dict[str, Any]:
    return {f"model.roi_heads.{b}pooler.{k}": v for b in branches for k, v in values.items()}


def _backbone(name: str, weights: str) -> dict[str, Any]:
    return {"model.backbone.name": name, "train.init_checkpoint": weights}


_TEST_DEV, _KEYPOINT_TEST_DEV = "coco_2017_test-dev", "keypoints_coco_2017_test-dev"
_MSRA = "detectron2://ImageNetPretrained/MSRA"
_POOL = {"pooler_type": "RoIPool", "aggregation": "max"}

# Every config that is made from another row: which, and what it changes, all of it.
DIFFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "table1_main/r101_c4": ("table2a_backbone/r101_c4", _test_split(_TEST_DEV)),
    "table1_main/r101_fpn": ("table2a_backbone/r101_fpn", _test_split(_TEST_DEV)),
    "table1_main/x101_fpn": ("table2a_backbone/x101_fpn", _test_split(_TEST_DEV)),
    "table2a_backbone/r101_c4": (
        "table2a_backbone/r50_c4",
        {
            **_backbone("ResNet-101-C4", f"{_MSRA}/R-101.pkl"),
            **{  # its channels are read in several places
                f"model.{node}.name": "ResNet-101-C4"
                for node in (
                    *("proposal_generator.head.in_channels", "roi_heads.res5"),
                    "roi_heads.box_predictor.input_shape.channels",
                    "roi_heads.mask_head.input_shape.channels",
                )
            },
        },
    ),
    "table2a_backbone/r101_fpn": (
        "table2a_backbone/r50_fpn",
        _backbone("ResNet-101-FPN", f"{_MSRA}/R-101.pkl"),
    ),
    "table2a_backbone/x101_fpn": (
        "table2a_backbone/r50_fpn",
        {
            **_backbone("ResNeXt-101-FPN", "catalog://ImageNetPretrained/FAIR/X-101-64x4d"),
            "model.backbone.stride_in_1x1": False,
            "dataloader.train.total_batch_size": 8,
            "optimizer.lr": 0.01,
        },
    ),
    "table2b_mask_loss/sigmoid": ("table2a_backbone/r50_c4", {}),
    "table2b_mask_loss/softmax": (
        "table2b_mask_loss/sigmoid",
        {"model.roi_heads.mask_head.loss_type": "softmax"},
    ),
    "class_agnostic/r50_c4": (
        "table2a_backbone/r50_c4",
        {"model.roi_heads.mask_head.num_classes": 1},
    ),
    "table2c_roi_layer/roialign_ave": ("table2a_backbone/r50_c4", {}),
    "table2c_roi_layer/roialign_max": (
        "table2c_roi_layer/roialign_ave",
        _pooler("", aggregation="max"),
    ),
    "table2c_roi_layer/roipool_max": ("table2c_roi_layer/roialign_ave", _pooler("", **_POOL)),
    "table2c_roi_layer/roiwarp_ave": (
        "table2c_roi_layer/roialign_ave",
        _pooler("", pooler_type="RoIWarp"),
    ),
    "table2c_roi_layer/roiwarp_max": (
        "table2c_roi_layer/roialign_ave",
        _pooler("", pooler_type="RoIWarp", aggregation="max"),
    ),
    "table2d_stride32/roipool": (
        "table2d_stride32/roialign",
        _pooler("box_", "mask_", **_POOL),
    ),
    "fpn_roi_layer/roipool": ("table2a_backbone/r50_fpn", _pooler("box_", "mask_", **_POOL)),
    "table2e_mask_branch/fcn": ("table2a_backbone/r50_fpn", {}),
    "table2e_mask_branch/mlp_2fc": (
        "table2e_mask_branch/fcn",
        {
            "model.roi_heads.mask_head._target_": MaskRCNNMLPHead,
            "model.roi_heads.mask_head.conv_dims": REMOVED,
            "model.roi_heads.mask_head.fc_dims": ADDED,
            "model.roi_heads.mask_head.mask_side": ADDED,
        },
    ),
    "table2e_mask_branch/mlp_3fc": (
        "table2e_mask_branch/mlp_2fc",
        {"model.roi_heads.mask_head.fc_dims": [1024, 1024, 1024]},
    ),
    "table3_box/mask_rcnn_r101_fpn": ("table1_main/r101_fpn", {}),
    "table3_box/mask_rcnn_x101_fpn": ("table1_main/x101_fpn", {}),
    "table3_box/faster_rcnn_r101_fpn": ("table3_box/mask_rcnn_r101_fpn", _masks("bbox")),
    "table4_keypoints/keypoint_only": (
        "table5_multitask/keypoint_only",
        _test_split(_KEYPOINT_TEST_DEV),
    ),
    "table4_keypoints/keypoint_and_mask": (
        "table5_multitask/keypoint_and_mask",
        _test_split(_KEYPOINT_TEST_DEV),
    ),
    "table5_multitask/mask_only": ("table5_multitask/box_only", _masks("bbox", "segm")),
    "table5_multitask/keypoint_only": (
        "table5_multitask/box_only",
        {
            "dataloader.evaluator.tasks": ["bbox", "keypoints"],
            "dataloader.train.mapper.use_keypoint": True,
            "dataloader.train.mapper.keypoint_hflip_indices": ADDED,
            **_branch("keypoint", ADDED),
        },
    ),
    "table5_multitask/keypoint_and_mask": (
        "table5_multitask/keypoint_only",
        _masks("bbox", "keypoints", "segm"),
    ),
    "table6_keypoint_roi/roialign": ("table5_multitask/keypoint_only", {}),
    "table6_keypoint_roi/roipool": (
        "table6_keypoint_roi/roialign",
        _pooler("box_", "keypoint_", **_POOL),
    ),
    "timing/r101_c4": ("table2a_backbone/r101_c4", {}),
    "timing/r101_fpn": ("table2a_backbone/r101_fpn", {}),
    "timing/faster_rcnn_r101_c4": (
        "timing/r101_c4",
        {
            **{k: v for k, v in _masks("bbox").items() if "roi_heads" not in k},
            "model.roi_heads.mask_head": REMOVED,
        },
    ),
    "timing/faster_rcnn_r101_fpn": ("timing/r101_fpn", _masks("bbox")),
}
# The others are made of configs/common alone.
BASES = {
    *("table2a_backbone/r50_c4", "table2a_backbone/r50_fpn", "table2d_stride32/roialign"),
    "table5_multitask/box_only",
}
# Follow from the config's name.
_NAME = {"source.config", "train.output_dir", "dataloader.evaluator.output_dir"}


def differences(a: Any, b: Any, prefix: str = "") -> dict[str, Any]:
    """{key: its value in b} where two containers differ, not going into what one has not."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = {}
        for key in a.keys() | b.keys():
            if key not in a or key not in b:
                found[f"{prefix}{key}"] = ADDED if key in b else REMOVED
            else:
                found |= differences(a[key], b[key], f"{prefix}{key}.")
        return found
    return {} if a == b else {prefix.rstrip("."): b}


@functools.cache
def resolved(name: str) -> Any:
    """A config as a container, interpolations replaced by what they stand for."""
    return OmegaConf.to_container(get_config(name), resolve=True)


def test_a_config_for_each_row_of_the_paper_and_no_other() -> None:
    assert sorted(row.config for row in ROWS if row.config) == CONFIGS
    assert DIFFERENCES.keys() | BASES == set(CONFIGS)
    assert "synthetic" in list_overlays()


def test_a_config_for_each_family_of_other_backbones() -> None:
    others = sorted(set(list_configs()) - set(CONFIGS))
    assert others == [
        f"backbones/{n}" for n in ("convnext_tiny", "efficientnet_lite0", "swin_tiny")
    ]
    base = resolved("table2a_backbone/r50_fpn")
    for name in others:
        found = {key.rpartition(".")[0] for key in differences(base, resolved(name))}
        assert found <= {
            *("model", "model.backbone", "train", "optimizer"),
            *("dataloader.train.mapper", "dataloader.test.mapper", "dataloader.evaluator"),
            "source",
        }
        changed = {*differences(base, resolved(name))}
        kept = ("train.", "lr_multiplier", "model.roi_heads", "model.proposal_generator")
        assert {key for key in changed if key.startswith(kept)} == {
            *("train.init_checkpoint", "train.output_dir"),
        }
        cfg = get_config(name, ["model.backbone.name=resnet18"])
        assert cfg.train.init_checkpoint == "timm://resnet18"
        assert cfg.model.pixel_mean.name == cfg.model.pixel_std.name == "resnet18"


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_names_row_numbers_command_and_state(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((CONFIG_DIR / f"{name}.py").read_text()))
    assert docstring is not None
    first, command, ours, divergences, *_ = docstring.split("\n\n")
    row = row_of(name)
    assert row is not None
    assert " ".join(first.split()) == row.summary()
    assert command.split() == f"python train.py --config-file {name} --num-gpus 8".split()
    assert ours == "Ours: not run."
    assert divergences.startswith("Divergences from the paper: ")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_config_differs_from_its_base_as_declared_and_no_more(name: str) -> None:
    base, expected = DIFFERENCES[name]
    found = differences(resolved(base), resolved(name))
    assert {k: v for k, v in found.items() if k not in _NAME} == expected


@pytest.mark.parametrize("name", [n for n, (_, changed) in DIFFERENCES.items() if not changed])
def test_row_equal_to_another_only_imports_it(name: str) -> None:
    docstring, *statements = ast.parse((CONFIG_DIR / f"{name}.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert [type(s) for s in statements] == [ast.ImportFrom]


@pytest.mark.parametrize(
    ("name", "overlay"),  # the rows themselves train in test_stock_scripts.py
    [
        ("table2b_mask_loss/softmax", "ablation"),
        ("table2a_backbone/x101_fpn", "synthetic"),
        ("table2d_stride32/roialign", "ablation"),
        ("table2e_mask_branch/mlp_3fc", "synthetic"),
        ("table5_multitask/keypoint_and_mask", "ablation"),
        ("timing/faster_rcnn_r101_c4", "synthetic"),
        pytest.param("backbones/efficientnet_lite0", "synthetic", marks=NEEDS_TIMM),
    ],
)
def test_config_trains_a_step_and_predicts_at_toy_size(
    name: str, overlay: str, toy_overrides: list[str]
) -> None:
    torch.manual_seed(0)
    cfg = get_config(f"{name}+{overlay}", toy_overrides)
    setup_datasets(cfg)
    model = instantiate(cfg.model)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    heads = cfg.model.roi_heads
    assert ("loss_mask" in losses) == ("mask_head" in heads)
    assert ("loss_keypoint" in losses) == ("keypoint_head" in heads)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    model.eval()
    with torch.no_grad():
        (output,) = model(next(iter(instantiate(cfg.dataloader.test))))
    instances = output["instances"]
    assert instances.has("pred_masks") == ("mask_head" in heads)
    assert instances.has("pred_keypoints") == ("keypoint_head" in heads)


def test_paper_values_of_the_fpn_config() -> None:
    cfg = get_config("table2a_backbone/r50_fpn")
    heads = cfg.model.roi_heads
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    assert list(cfg.model.proposal_generator.post_nms_topk) == [1000, 1000]
    assert heads.box_predictor.test_topk_per_image == 100
    assert heads.mask_pooler.output_size == 14
    assert list(heads.mask_head.conv_dims) == [256] * 5
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (
        0.02,
        0.9,
        0.0001,
    )
    assert cfg.train.max_iter == 160_000
    assert list(cfg.lr_multiplier.scheduler.milestones) == [120_000, cfg.train.max_iter]
    assert list(cfg.dataloader.train.mapper.augmentations[0].short_edge_length) == [800]
    assert cfg.dataloader.train.total_batch_size == 16
    assert list(cfg.dataset.train.names) == ["coco_2014_train", "coco_2014_valminusminival"]
    assert list(cfg.dataset.test.names) == ["coco_2014_minival"]


def test_paper_values_of_the_c4_config() -> None:
    cfg = get_config("table2a_backbone/r50_c4")
    heads = cfg.model.roi_heads
    assert heads.batch_size_per_image == 64
    assert cfg.model.proposal_generator.post_nms_topk[1] == 300
    assert (heads.pooler.output_size, heads.res5.stride) == (7, 1)
    assert cfg.model.proposal_generator.head.num_anchors == 15


def test_paper_values_of_the_c5_config() -> None:
    cfg = get_config("table2d_stride32/roialign")
    rpn = cfg.model.proposal_generator
    assert cfg.model.backbone.name == "ResNet-50-C5"
    assert rpn.head.num_anchors == 15
    assert (list(rpn.anchor_generator.strides), list(rpn.in_features)) == ([32], ["res5"])
    for branch in ("box", "mask"):
        assert list(cfg.model.roi_heads[f"{branch}_pooler"].scales) == [1 / 32]
        assert list(cfg.model.roi_heads[f"{branch}_in_features"]) == ["res5"]


@pytest.mark.parametrize(
    ("row", "train", "test"),
    [
        ("table2c_roi_layer/roialign_ave+ablation", [256], 256),
        ("table4_keypoints/keypoint_only+ablation", [205, 256], 256),
        ("table2a_backbone/r50_fpn+synthetic+lsj", 256, 256),
        ("table2a_backbone/r50_fpn+lsj+synthetic", 256, 256),
    ],
)
def test_drawn_images_are_trained_on_in_the_size_they_are_drawn_in(
    row: str, train: list[int] | int, test: int
) -> None:
    cfg = get_config(row, ["dataset.synthetic.size=256"])
    resize = cfg.dataloader.train.mapper.augmentations[0]
    assert resize.get("short_edge_length", resize.get("target_height")) == train
    assert cfg.dataloader.test.mapper.augmentations[0].short_edge_length == test
    sizes = itertools.chain(*cfg.model.proposal_generator.anchor_generator.sizes)
    assert list(sizes) == [16, 32, 64, 128, 256]


def test_no_anchor_of_drawn_images_is_rounded_to_nothing() -> None:
    cfg = get_config("table2a_backbone/r50_fpn+synthetic", ["dataset.synthetic.size=8"])
    assert cfg.model.proposal_generator.anchor_generator.sizes == [[1], [1], [2], [4], [8]]


def test_widths_of_the_mlp() -> None:
    head = get_config("table2e_mask_branch/mlp_2fc").model.roi_heads.mask_head
    assert (list(head.fc_dims), head.mask_side) == ([1024, 1024], 28)


def test_paper_values_of_the_keypoint_config() -> None:
    cfg = get_config("table4_keypoints/keypoint_only")
    assert list(cfg.model.roi_heads.keypoint_head.conv_dims) == [512] * 8
    assert cfg.train.max_iter == 90_000
    assert list(cfg.lr_multiplier.scheduler.milestones) == [60_000, 80_000, 90_000]
    assert cfg.model.roi_heads.num_classes == 1
    resize = cfg.dataloader.train.mapper.augmentations[0]
    assert (list(resize.short_edge_length), resize.sample_style) == ([640, 800], "range")
    assert cfg.dataloader.train.dataset.min_keypoints == 1


@pytest.mark.parametrize("name", sorted(BASES))
def test_one_key_limits_the_detections_of_model_and_evaluator(name: str) -> None:
    cfg = get_config(name, ["dataset.test.max_detections=300"])
    assert cfg.model.roi_heads.box_predictor.test_topk_per_image == 300
    assert cfg.dataloader.evaluator.max_detections == 300


def test_path_and_short_name_give_the_same_config(tmp_path: Path) -> None:
    name = "table2a_backbone/r50_fpn"
    by_name = get_config(name)
    by_path = get_config(str(CONFIG_DIR / f"{name}.py"))
    assert by_name == by_path
    assert by_name.train.output_dir == "output/table2a_backbone/r50_fpn"
    assert base_name(get_config(f"{name}+synthetic")) == base_name(by_path) == name


def test_the_config_yaml_of_an_output_folder_is_the_config_of_the_run(tmp_path: Path) -> None:
    name = "table5_multitask/keypoint_and_mask+synthetic"
    cfg = get_config(name, ["train.max_iter=7", f"train.output_dir={tmp_path}", "+mine=3"])
    file = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(file))  # as detectron2's default_setup does
    again = get_config(str(file))
    assert flatten(again, resolve=True) == flatten(cfg, resolve=True)
    assert again.source.config == LazyConfig.load(str(file)).source.config == name
    assert base_name(get_config(str(file))) == "table5_multitask/keypoint_and_mask"
    assert get_config(str(file), ["optimizer.lr=0.5"]).optimizer.lr == 0.5
    with pytest.raises(ConfigError, match="'train.max_iter'"):
        get_config(str(file), ["train.max_iters=3"])


def test_the_config_yaml_of_a_stock_run_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    name = "table2a_backbone/r50_c4"
    LazyConfig.save(LazyConfig.load(str(CONFIG_DIR / f"{name}.py")), str(file))
    cfg = get_config(str(file))
    assert flatten(cfg, resolve=True) == flatten(get_config(name), resolve=True) | {
        "source.config": "",
        "train.output_dir": "output",
        "dataloader.evaluator.output_dir": "output",
    }
    assert row_of(base_name(cfg)) is None
    assert row_of(base_name(get_config(f"{file}+ablation"))) is None


def test_the_config_yaml_of_a_moved_output_folder_names_where_it_is(tmp_path: Path) -> None:
    cfg = get_config("table2a_backbone/r50_c4", ["train.output_dir=gone/before"])
    for name in ("config.yaml", "mine.yaml"):
        LazyConfig.save(cfg, str(tmp_path / name))
    file = str(tmp_path / "config.yaml")
    assert get_config(file).train.output_dir == "gone/before"  # a file that somebody has copied
    (tmp_path / "log.txt").touch()
    assert get_config(file).train.output_dir == str(tmp_path)
    assert get_config(file).dataloader.evaluator.output_dir == str(tmp_path)
    assert get_config(file, ["train.output_dir=a"]).train.output_dir == "a"
    assert get_config(str(tmp_path / "mine.yaml")).train.output_dir == "gone/before"


def test_a_moved_output_folder_has_its_split_with_it(tmp_path: Path) -> None:
    cfg = get_config("table2a_backbone/r50_c4", ["train.output_dir=gone/before"])
    files = [f"gone/before/split/{name}.json" for name in ("train", "test")]
    for split, file in zip((cfg.dataset.train, cfg.dataset.test), files):
        split.update(json=file, images="gone/images", names=[file])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    (tmp_path / "log.txt").touch()
    (tmp_path / "split").mkdir()
    for name in ("train", "test"):
        split = get_config(str(tmp_path / "config.yaml")).dataset[name]
        assert split.json == f"gone/before/split/{name}.json"  # it has been left behind
        moved = tmp_path / "split" / f"{name}.json"
        moved.touch()
        split = get_config(str(tmp_path / "config.yaml")).dataset[name]
        assert (split.json, split.names) == (str(moved), [str(moved)])
        assert split.images == "gone/images"


def test_an_output_folder_stands_for_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "r50_fpn+synthetic"  # a plus of its own
    folder.mkdir()
    cfg = get_config("table2a_backbone/r50_fpn+synthetic")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    assert get_config(str(folder)).source == cfg.source
    with_overlay = get_config(f"{folder}+stock")
    assert with_overlay.source.config == "table2a_backbone/r50_fpn+synthetic+stock"
    (tmp_path / "r50_fpn").mkdir()  # another run
    assert get_config(f"{folder}+stock") == with_overlay


def test_a_file_of_another_kind_is_told_what_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.touch()
    with pytest.raises(ConfigError, match=r"config\.json'.*\.py.*config\.yaml"):
        get_config(str(file))


@pytest.mark.parametrize(
    ("override", "output"),
    [
        ("train.seed=1", "output/table2a_backbone/r50_fpn+synthetic"),
        ("train.output_dir=", "output/table2a_backbone/r50_fpn+synthetic"),
        ("train.output_dir=null", "output/table2a_backbone/r50_fpn+synthetic"),
        ("train.output_dir=output", "output"),
        ("train.output_dir=20231105", "20231105"),
    ],
)
def test_an_output_folder_that_is_not_given_has_the_configs_name(
    override: str, output: str
) -> None:
    cfg = get_config("table2a_backbone/r50_fpn+synthetic", [override])
    assert cfg.train.output_dir == cfg.dataloader.evaluator.output_dir == output


def test_a_flat_config_is_plain_and_tells_configs_apart() -> None:
    cfg = get_config("table2a_backbone/r50_fpn")
    flat = flatten(cfg)
    assert flat["train.max_iter"] == 160_000
    assert flat["model.roi_heads.mask_head.num_classes"] == "${..num_classes}"
    assert flat["model.roi_heads.box_head.conv_dims"] == []
    assert flat["model.backbone._target_"] == "mask_rcnn_plugin.modeling.backbone.resnet_backbone"
    assert flat["dataloader.train.mapper.augmentations.0.short_edge_length.0"] == 800
    assert (
        json.loads(json.dumps(flat))
        == flat
        == flatten(get_config("table2e_mask_branch/fcn"))
        | {key: flat[key] for key in ("train.output_dir", "source.config")}
    )
    assert flatten(get_config("table2a_backbone/r50_fpn", ["optimizer.lr=0.1"])) != flat


def test_own_config_file_has_an_output_folder_of_its_name(tmp_path: Path) -> None:
    file = tmp_path / "own" / "mine.py"
    file.parent.mkdir()
    file.write_text((CONFIG_DIR / "table2a_backbone" / "r50_fpn.py").read_text())
    shutil.copytree(CONFIG_DIR / "common", tmp_path / "common")
    assert get_config(str(file)).train.output_dir == "output/mine"


def test_unknown_config_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'table2a_backbone/r50_fpn'"):
        get_config("table2a/r50_fpn")


def test_unknown_overlay_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no overlay 'synth'; .*\['ablation', "):
        get_config("table2a_backbone/r50_fpn+synth")


def test_an_overlay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="overlay 'synthetic' does not fit .*KeyError: 'ResNet-18"
    ):
        get_config("table2a_backbone/r50_fpn+synthetic+synthetic")


def test_part_of_a_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.py .*'dataset'"):
        get_config("common/train")


def test_plus_in_a_path_is_no_overlay(tmp_path: Path) -> None:
    file = tmp_path / "c++" / "mine.py"
    file.parent.mkdir()
    file.write_text((CONFIG_DIR / "table2a_backbone" / "r50_c4.py").read_text())
    with pytest.raises(ConfigError, match=r"ImportError in .*common/data\.py"):
        get_config(str(file))


def test_yaml_of_detectron2_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "mask_rcnn.yaml"
    file.write_text("MODEL: {MASK_ON: true}")
    with pytest.raises(ConfigError, match="DETECTRON2_ENV_MODULE"):
        get_config(str(file))
    file.write_text("- 3")
    with pytest.raises(ConfigError, match=str(file)):
        get_config(str(file))


def test_yaml_keys_are_added_once_and_keep_their_values() -> None:
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    assert cfg.MODEL.ROI_MASK_HEAD.LOSS_TYPE == "sigmoid"
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_AGGREGATION == "ave"
    cfg.MODEL.ROI_MASK_HEAD.LOSS_TYPE = "softmax"
    add_mask_rcnn_config(cfg)
    assert cfg.MODEL.ROI_MASK_HEAD.LOSS_TYPE == "softmax"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_is_fine_tuned(name: str) -> None:
    cfg = get_config(f"{name}+finetune", ["finetune.batch=4", "finetune.epochs=2"])
    assert cfg.optimizer.lr == pytest.approx(0.02 * 4 / 16)
    assert (cfg.train.epochs, cfg.dataloader.train.total_batch_size) == (2, 4)
    cfg = get_config(f"{name}+finetune+synthetic", ["finetune.lr=0.1", "train.device=cpu"])
    for key, pooler in cfg.model.roi_heads.items():
        if key.endswith("pooler"):
            instantiate(pooler)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("finetune.lr=-1", r"finetune\.lr is -1, must be"),
        ("finetune.lr=fast", r"finetune\.lr is 'fast', must be"),
        ("finetune.batch=0", r"finetune\.batch is 0, must be"),
        ("finetune.epochs=0", r"finetune\.epochs is 0, must be"),
    ],
)
def test_a_wrong_number_of_a_fine_tuning_is_named_as_it_was_given(
    override: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        get_config("table2a_backbone/r50_fpn+finetune", [override])


def test_the_zoos_settings_are_those_of_its_configs() -> None:
    cfg = get_config("table2a_backbone/r50_c4+zoo_c4").model
    assert (cfg.roi_heads.pooler.output_size, cfg.roi_heads.pooler.sampling_ratio) == (14, 0)
    assert cfg.roi_heads.res5.stride == 2
    assert tuple(cfg.proposal_generator.post_nms_topk) == (2000, 1000)
    heads = get_config("table4_keypoints/keypoint_and_mask+zoo_fpn").model.roi_heads
    assert [heads[f"{b}_pooler"].sampling_ratio for b in ("box", "mask", "keypoint")] == [0, 0, 0]
    with pytest.raises(ConfigError, match="zoo_c4"):
        get_config("table2a_backbone/r50_fpn+zoo_c4")


def test_torchvisions_settings_outdo_those_of_a_fine_tuning() -> None:
    cfg = get_config("table4_keypoints/keypoint_and_mask+finetune+torchvision")
    model = cfg.model
    assert cfg.train.init_checkpoint == ""  # no BGR weights
    assert model.input_format == "RGB"
    assert not model.backbone.stride_in_1x1
    poolers = [model.roi_heads[f"{branch}_pooler"] for branch in ("box", "mask", "keypoint")]
    assert {(p.pooler_type, p.sampling_ratio) for p in poolers} == {("ROIAlign", 2)}
    for name in ("table2a_backbone/r50_c4", "backbones/efficientnet_lite0"):
        with pytest.raises(ConfigError, match=r"a ResNet with an FPN for \+torchvision"):
            get_config(f"{name}+torchvision")


@pytest.mark.parametrize(
    "name",
    ["table4_keypoints/keypoint_and_mask", "table2a_backbone/r50_c4", "table2d_stride32/roialign"],
)
def test_stock_parts_are_detectron2s(name: str) -> None:
    overrides = ["model.backbone.width=8"]
    with torch.device("meta"):
        ours, stock = (instantiate(get_config(n, overrides).model) for n in (name, f"{name}+stock"))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    replaced = {
        key
        for (key, module), other in zip(ours.named_modules(), stock.modules(), strict=True)
        if type(module) is not type(other)
    }
    expected = {f"proposal_generator{x}" for x in ("", ".anchor_generator")}
    expected |= {"roi_heads", "roi_heads.box_predictor"}
    assert replaced - {"roi_heads.keypoint_head"} == expected
    for key in replaced:
        assert type(stock.get_submodule(key)).__module__.startswith("detectron2.")
        assert isinstance(ours.get_submodule(key), type(stock.get_submodule(key)))
