"""Keys of the plugin in YAML: a warning for those that the chosen classes don't read."""

import warnings
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY

from mask_rcnn_plugin import add_mask_rcnn_config
from mask_rcnn_plugin.modeling import MaskRCNNFCNHead, MaskRCNNROIHeads

FPN_LEVELS = ["res2", "res3", "res4", "res5"]
OURS = {
    "MODEL.META_ARCHITECTURE": "MaskRCNN",
    "MODEL.BACKBONE.NAME": "build_mask_rcnn_resnet_backbone",
    "MODEL.ROI_HEADS.NAME": "MaskRCNNROIHeads",
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNFCNHead",
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "MaskRCNNKeypointHead",
}
STOCK = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "KRCNNConvDeconvUpsampleHead",
}
C4 = {
    "MODEL.ROI_HEADS.NAME": "MaskRCNNC4ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.FPN.IN_FEATURES": [],
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32]],
}


@ROI_HEADS_REGISTRY.register()
class HeadsOfAnotherProject(StandardROIHeads):
    pass


@ROI_HEADS_REGISTRY.register()
class OurHeadsOfAnotherProject(MaskRCNNROIHeads):
    pass


@ROI_MASK_HEAD_REGISTRY.register()
class MaskHeadOfAnotherProject(MaskRCNNFCNHead):
    pass


def config(keys: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    model = cfg.MODEL
    model.DEVICE = "meta"
    model.MASK_ON = True
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = FPN_LEVELS
    model.RPN.IN_FEATURES = model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.ANCHOR_GENERATOR.SIZES = [[32]] * 4
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 1
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    for key, value in keys.items():
        cfg.merge_from_list([key, value])
    return cfg


def shown(keys: dict[str, Any]) -> list[str]:
    """The plugin's warnings of a program that builds the model, whatever Python would filter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.device("meta"):
            build_model(config(keys))
    return [str(w.message) for w in caught if "mask_rcnn_plugin/modeling" in w.filename]


IGNORED = {
    "loss of the stock mask head": (
        {"MODEL.ROI_MASK_HEAD.LOSS_TYPE": "softmax"},
        {"MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead"},
        ["softmax", "MaskRCNNFCNHead", "MaskRCNNMLPHead"],
    ),
    "fully connected layers of the FCN": (
        {"MODEL.ROI_MASK_HEAD.FC_DIMS": [512]},
        {"MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNFCNHead"},
        ["512", "MaskRCNNMLPHead"],
    ),
    "format of the stock meta-architecture": (
        {"MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT": "rle"},
        {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN"},
        ["rle", "MaskRCNN"],
    ),
    "aggregation of the stock RoI heads": (
        {"MODEL.ROI_BOX_HEAD.POOLER_AGGREGATION": "max"},
        {"MODEL.ROI_HEADS.NAME": "StandardROIHeads"},
        ["max", "MaskRCNNROIHeads", "MaskRCNNC4ROIHeads"],
    ),
    "mask pooler of C4": (
        {"MODEL.ROI_MASK_HEAD.POOLER_TYPE": "RoIWarp"},
        {"MODEL.ROI_HEADS.NAME": "MaskRCNNC4ROIHeads"},
        ["RoIWarp", "MaskRCNNROIHeads"],
    ),
}


@pytest.mark.parametrize(("key", "choice", "named"), IGNORED.values(), ids=IGNORED)
def test_an_ignored_key_is_one_warning(
    key: dict[str, Any], choice: dict[str, str], named: list[str]
) -> None:
    c4 = C4 if "MaskRCNNC4ROIHeads" in choice.values() else {}
    assert shown({**OURS, **c4, **choice}) == []
    (warning,) = shown({**OURS, **c4, **choice, **key})
    for text in [*key, *choice, *choice.values(), *named]:
        assert text in warning


@pytest.mark.parametrize(
    "ours",
    [
        ["META_ARCHITECTURE"],
        ["BACKBONE.NAME"],
        ["ROI_HEADS.NAME"],
        ["ROI_MASK_HEAD.NAME"],
        ["ROI_KEYPOINT_HEAD.NAME"],
        ["META_ARCHITECTURE", "ROI_HEADS.NAME"],
        ["BACKBONE.NAME", "ROI_MASK_HEAD.NAME"],
        ["ROI_HEADS.NAME", "ROI_MASK_HEAD.NAME", "ROI_KEYPOINT_HEAD.NAME"],
        ["META_ARCHITECTURE", "BACKBONE.NAME", "ROI_HEADS.NAME", "ROI_MASK_HEAD.NAME"],
    ],
)
def test_all_ignored_keys_are_in_one_warning(ours: list[str]) -> None:
    chosen = {f"MODEL.{key}": OURS[f"MODEL.{key}"] for key in ours}
    readers = {
        "MODEL.ROI_MASK_HEAD.LOSS_TYPE": ("softmax", "MODEL.ROI_MASK_HEAD.NAME"),
        "MODEL.ROI_MASK_HEAD.FC_DIMS": ([8], ""),
        "MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT": ("rle", "MODEL.META_ARCHITECTURE"),
        "MODEL.ROI_MASK_HEAD.POOLER_AGGREGATION": ("max", "MODEL.ROI_HEADS.NAME"),
    }
    values = {key: value for key, (value, _) in readers.items()}
    sampled = {"MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2}
    for _ in range(2):  # models
        (warning,) = shown({**STOCK, "MODEL.KEYPOINT_ON": True, **chosen, **values, **sampled})
        for key, (_, reader) in readers.items():
            assert (key in warning) == (reader not in chosen)


def test_a_subclass_of_another_project_warns_once() -> None:
    keys = {
        "MODEL.ROI_HEADS.NAME": "OurHeadsOfAnotherProject",
        "MODEL.ROI_MASK_HEAD.NAME": "MaskHeadOfAnotherProject",
        "MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT": "rle",
    }
    assert len(shown({**STOCK, **keys})) == 1


def test_the_stock_heads_refuse_our_pooler_after_the_warning() -> None:
    """That error of detectron2's doesn't say who knows the layer."""
    keys = {
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": "RoIWarp",
        "MODEL.KEYPOINT_ON": True,
    }
    with (
        pytest.warns(UserWarning, match="ROI_KEYPOINT_HEAD.POOLER_TYPE.*MaskRCNNROIHeads"),
        pytest.raises(ValueError, match="RoIWarp"),
        torch.device("meta"),
    ):
        build_model(config({**OURS, **keys}))


READ = {
    "MODEL.ROI_MASK_HEAD.LOSS_TYPE": "softmax",
    "MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT": "rle",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "RoIWarp",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "RoIAlign",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.ROI_MASK_HEAD.POOLER_AGGREGATION": "max",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
}


NOT_IGNORED = {
    "nothing set": {},
    "all read": READ,
    "C4 pools alike": {
        **C4,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "RoIWarp",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "RoIWarp",
    },
    "no masks": {**READ, "MODEL.MASK_ON": False, "MODEL.ROI_MASK_HEAD.FC_DIMS": [16]},
    "no keypoints": {
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_AGGREGATION": "max",
    },
    "a subclass": {
        "MODEL.ROI_MASK_HEAD.NAME": "MaskHeadOfAnotherProject",
        "MODEL.ROI_MASK_HEAD.LOSS_TYPE": "softmax",
    },
    "another project's RoI heads": {
        "MODEL.ROI_HEADS.NAME": "HeadsOfAnotherProject",
        "MODEL.ROI_MASK_HEAD.POOLER_AGGREGATION": "max",
    },
}


@pytest.mark.parametrize("keys", NOT_IGNORED.values(), ids=NOT_IGNORED)
def test_no_warning(keys: dict[str, Any]) -> None:
    assert shown({**OURS, **keys}) == []


def test_a_config_without_the_keys_is_refused() -> None:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "MaskRCNN"
    with pytest.raises(KeyError, match="add_mask_rcnn_config.*DETECTRON2_ENV_MODULE"):
        build_model(cfg)
