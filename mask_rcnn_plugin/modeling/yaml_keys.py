"""The plugin's keys in a YAML config: their defaults, and the classes that read them."""

import copy
import warnings
from collections.abc import Iterator
from functools import reduce
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY

_DEFAULTS = {
    "BACKBONE.TIMM_NAME": "",
    "ROI_MASK_HEAD.LOSS_TYPE": "sigmoid",
    "ROI_MASK_HEAD.FC_DIMS": [1024, 1024],
    "ROI_MASK_HEAD.OUTPUT_FORMAT": "bitmap",
    "ROI_BOX_HEAD.POOLER_AGGREGATION": "ave",
    "ROI_MASK_HEAD.POOLER_AGGREGATION": "ave",
    "ROI_KEYPOINT_HEAD.POOLER_AGGREGATION": "ave",
}

# Those of POOLER_TYPE that detectron2 doesn't know.
_POOLER_TYPES = ("RoIAlign", "RoIWarp", "RoIPool")

# The key that names a class, and the classes by their names, in the order they are built in.
_CHOICES = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
}

# The classes that read a key. C4's heads pool once, for the box and the mask.
_READERS = {
    "BACKBONE.TIMM_NAME": ("BACKBONE.NAME", ["build_mask_rcnn_timm_backbone"]),
    "ROI_MASK_HEAD.LOSS_TYPE": ("ROI_MASK_HEAD.NAME", ["MaskRCNNFCNHead", "MaskRCNNMLPHead"]),
    "ROI_MASK_HEAD.FC_DIMS": ("ROI_MASK_HEAD.NAME", ["MaskRCNNMLPHead"]),
    "ROI_MASK_HEAD.OUTPUT_FORMAT": ("META_ARCHITECTURE", ["MaskRCNN"]),
}
for _key in ("POOLER_TYPE", "POOLER_AGGREGATION"):
    _READERS |= {
        f"ROI_BOX_HEAD.{_key}": ("ROI_HEADS.NAME", ["MaskRCNNROIHeads", "MaskRCNNC4ROIHeads"]),
        f"ROI_MASK_HEAD.{_key}": ("ROI_HEADS.NAME", ["MaskRCNNROIHeads"]),
        f"ROI_KEYPOINT_HEAD.{_key}": ("ROI_HEADS.NAME", ["MaskRCNNROIHeads"]),
    }


def add_mask_rcnn_config(cfg: CfgNode) -> None:
    """Add the plugin's keys to a detectron2 YAML config; those that are there keep their values.

    MODEL.BACKBONE.TIMM_NAME: the model of `build_mask_rcnn_timm_backbone`.
    MODEL.ROI_MASK_HEAD.LOSS_TYPE: "sigmoid" or "softmax" (Table 2b).
    MODEL.ROI_MASK_HEAD.FC_DIMS: hidden widths of `MaskRCNNMLPHead` (Table 2e).
    MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT: "bitmap" or "rle", what `MaskRCNN` returns.
    MODEL.ROI_{BOX,MASK,KEYPOINT}_HEAD.POOLER_AGGREGATION: "ave" or "max" (Table 2c).

    detectron2's own MODEL.ROI_{BOX,MASK,KEYPOINT}_HEAD.POOLER_TYPE also takes "RoIPool", "RoIWarp"
    and "RoIAlign" with the plugin's RoI heads.
    """
    for key, value in _DEFAULTS.items():
        head, name = key.split(".")
        cfg.MODEL[head].setdefault(name, copy.copy(value))


def require_mask_rcnn_config(cfg: CfgNode, choice: str) -> None:
    """
    Args:
        cfg: a YAML config.
        choice: as in `warn_of_ignored_keys`, which is called.

    Raises:
        KeyError: if `add_mask_rcnn_config` was not called on it.
    """
    if "LOSS_TYPE" not in cfg.MODEL.ROI_MASK_HEAD:
        raise KeyError(
            "the config lacks the plugin's keys: call mask_rcnn_plugin.add_mask_rcnn_config(cfg) "
            "after get_cfg(), or set DETECTRON2_ENV_MODULE=mask_rcnn_plugin.env"
        )
    warn_of_ignored_keys(cfg, choice)


def require_pooler(cfg: CfgNode, branch: str, input_shape: Any) -> None:
    """Refuse feature maps, a dict, for the "MASK" or "KEYPOINT" head, which takes pooled features.

    Raises:
        ValueError: that names the key.
    """
    head = cfg.MODEL[f"ROI_{branch}_HEAD"]
    if isinstance(input_shape, dict):
        raise ValueError(
            f"MODEL.ROI_{branch}_HEAD.POOLER_TYPE is {head.POOLER_TYPE!r} (no pooler), but "
            f"{head.NAME} takes pooled features: name a pooler, e.g. ROIAlignV2"
        )


def warn_of_ignored_keys(cfg: CfgNode, choice: str) -> None:
    """Warn of the plugin's keys that are set but that none of the chosen classes reads.

    detectron2's classes don't look at them, so each of the plugin's calls this, in case it is the
    only one. The first that is built warns.

    Args:
        cfg: a YAML config.
        choice: the key of MODEL that chose the caller, e.g. "ROI_HEADS.NAME".
    """
    ours = (c for c in _CHOICES if "mask_rcnn_plugin" in _packages(cfg.MODEL, c))
    ignored = list(_ignored_keys(cfg.MODEL))
    if ignored and choice == next(ours, choice):
        warnings.warn("The chosen classes ignore " + "; ".join(ignored), stacklevel=1)


def _ignored_keys(model: CfgNode) -> Iterator[str]:
    off = [] if model.MASK_ON else ["ROI_MASK_HEAD"]
    off += [] if model.KEYPOINT_ON else ["ROI_KEYPOINT_HEAD"]
    for key, (choice, readers) in _READERS.items():
        head, name = key.split(".")
        value, default = _get(model, key), _DEFAULTS.get(key)
        is_set = value in _POOLER_TYPES if default is None else value not in (default, None)
        # Nothing is lost where the mask is to be pooled as the box is.
        as_the_box = head == "ROI_MASK_HEAD" and value == model.ROI_BOX_HEAD.get(name)
        if is_set and head not in off and not as_the_box and _ignores(model, choice, readers):
            yield (
                f"MODEL.{key}={value}, which {' and '.join(readers)} would read "
                f"(MODEL.{choice} is {_get(model, choice)})"
            )


def _ignores(model: CfgNode, choice: str, readers: list[str]) -> bool:
    # What the classes of other projects read is not known here.
    known = _packages(model, choice)[0] in ("detectron2", "mask_rcnn_plugin")
    return known and _get(model, choice) not in readers


def _packages(model: CfgNode, choice: str) -> list[str]:
    """Where a chosen class is from, then its bases."""
    name, classes = _get(model, choice), _CHOICES[choice]
    chosen = classes.get(name) if name in classes else object
    return [c.__module__.split(".")[0] for c in getattr(chosen, "__mro__", [chosen])]


def _get(model: CfgNode, key: str) -> Any:
    return reduce(lambda node, name: node.get(name), key.split("."), model)
