"""What a model's classes and keypoints are called, kept in its config."""

import logging
from pathlib import Path
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.data.coco import DatasetError, register_coco_dataset

# Fields of detectron2's Metadata that a config takes along.
_FIELDS = (
    *("thing_classes", "keypoint_names", "keypoint_classes", "keypoint_flip_map"),
    *("keypoint_connection_rules", "keypoint_oks_sigmas"),
)

logger = logging.getLogger(__name__)


def keep_metadata(cfg: DictConfig, dataset_name: str) -> None:
    """Write a registered dataset's metadata to `dataset.metadata`, for whoever gets the model.

    `category_ids` are the dataset's ids of the classes, in the order of the classes.
    """
    cfg.dataset.metadata = _registered(dataset_name)


def metadata_of(cfg: DictConfig) -> Metadata:
    """Metadata of a config's model: what `keep_metadata` has written, else that of its test set.

    Where neither has a name for each class, the names are "class 0", "class 1", ...
    """
    kept: Any = OmegaConf.to_container(cfg.dataset).get("metadata")  # type: ignore[union-attr]
    kept = kept or _of_test_set(cfg.dataset.test)
    count = cfg.model.roi_heads.num_classes
    if len(kept.get("thing_classes", ())) != count:
        logger.warning("The names of the %d classes are unknown, so they are numbered", count)
        kept = {"thing_classes": [f"class {i}" for i in range(count)]}
    ids = kept.pop("category_ids", range(count))
    to_class = {id_: class_ for class_, id_ in enumerate(ids)}
    return Metadata(name="model", thing_dataset_id_to_contiguous_id=to_class, **kept)


def _of_test_set(split: DictConfig) -> dict[str, Any]:
    """For configs that were written before they took metadata along, and those of COCO's sets."""
    try:
        own = split.json and Path(split.json).is_file()
        registered = next(iter(split.names), "")
        name = register_coco_dataset(split.json, split.images) if own else registered
    except DatasetError as error:
        logger.warning("%s", error)
        return {}
    return _registered(name) if name in MetadataCatalog.list() else {}


def _registered(name: str) -> dict[str, Any]:
    """As YAML has it: lists for tuples, and texts alone for keys."""
    metadata = MetadataCatalog.get(name)
    kept = {field: _lists(metadata.get(field)) for field in _FIELDS if metadata.get(field)}
    classes = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = {class_: id_ for id_, class_ in classes.items()}
    if sorted(ids) == list(range(len(kept.get("thing_classes", ())))):
        kept["category_ids"] = [ids[class_] for class_ in sorted(ids)]
    return kept


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
