"""Rows of a head that belong to a class, taken over by its name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.data import MetadataCatalog
from torch import nn

NO_CLASS = "N/A"  # torchvision's name for ids that COCO has no class for
# Rows of each class, and of the background after them. Layers that no class has rows of are not
# of these sizes, and are left as they are.
_ROWS = {
    "roi_heads.box_predictor.cls_score": (1, 1),
    "roi_heads.box_predictor.bbox_pred": (4, 0),
    "roi_heads.mask_head.predictor": (1, 0),
}


def class_names_of(path: str, weights: dict[str, Any], metadata: Any = None) -> list[str]:
    """Names of the classes of a file's weights: those of its metadata, if it has any, else of the
    config.yaml beside it, else COCO's for 80 classes; [] if they are not known."""
    try:
        metadata = metadata or config_beside(path)["dataset"]["metadata"]
        names = metadata["thing_classes"]
    except (LookupError, TypeError):  # none, or another program's
        names = []
    count = len(weights.get("roi_heads.box_predictor.cls_score.bias", ())) - 1
    if not names and count == 80:
        names = list(MetadataCatalog.get("coco_2017_val").thing_classes)
    return names if len(names) == count else []


def config_beside(path: str) -> dict[str, Any]:
    """The config.yaml beside weights, which is not trusted; {} if there is none."""
    try:
        cfg = yaml.load(Path(path).with_name("config.yaml").read_text(), _PlainLoader)
    except (OSError, ValueError, yaml.YAMLError):
        cfg = None
    return cfg if isinstance(cfg, dict) else {}


class _PlainLoader(yaml.SafeLoader):
    """Tuples, which detectron2 writes as Python's own, and what else has a tag, are None."""


_PlainLoader.add_multi_constructor("", lambda *_: None)


def keep_classes(
    weights: dict[str, Any], model: nn.Module, theirs: Sequence[str], ours: Sequence[str]
) -> list[str]:
    """Bring the rows of classes into a model's order, in place; new classes have the model's rows.

    Args:
        weights: of a file, by name.
        theirs, ours: names of its classes, and of the model's.

    Returns:
        The names that both have.
    """
    shared = [name for name in ours if name in theirs]
    state = model.state_dict()
    for layer, (each, background) in _ROWS.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key not in weights or key not in state:
                continue
            old, new = torch.as_tensor(weights[key]), state[key].clone()
            sizes = [each * len(names) + background for names in (theirs, ours)]
            if old.shape[1:] != new.shape[1:] or [len(old), len(new)] != sizes:
                continue
            for name in shared:
                source, target = each * theirs.index(name), each * ours.index(name)
                new[target : target + each] = old[source : source + each]
            if background:
                new[-background:] = old[-background:]
            weights[key] = new
    return shared
