"""Steps between a loaded config and a model: set up its datasets, and fit the model to them."""

import difflib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.config.check import walk
from mask_rcnn_plugin.data.coco import DatasetError, has_coco_file, load, register_coco_dataset
from mask_rcnn_plugin.data.folder import locate_sets
from mask_rcnn_plugin.data.metadata import keep_metadata
from mask_rcnn_plugin.data.synthetic import write_dataset
from mask_rcnn_plugin.evaluation.evaluator import keypoint_oks_sigmas
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.weights import WeightsError

_ROOM = 2**20  # bytes, for a start's log and config


def setup_datasets(cfg: DictConfig, *, training: bool = True) -> None:
    """Register the config's datasets and fit the model to them, in place.

    * The sets of `dataset.folder` and `dataset.split` are found; see `locate_sets`.
    * `dataset.synthetic`, where a split is in it, is drawn if it is not there yet.
    * `dataset.{train,test}.json` and `.images`, where set, are registered and become the split's
      `names`.
    * `model.roi_heads.num_classes` becomes the number of classes of the dataset; with a keypoint
      branch, the number of keypoints and their left-right pairs likewise.
    * `dataset.metadata` becomes what the classes and keypoints are called; see `keep_metadata`.

    Args:
        training: False leaves the training set alone, which need not be there to evaluate.

    Raises:
        DatasetError: if a dataset does not exist or is not COCO-format, if training and test set
            have different classes or keypoints, if there is no training set or more than one test
            set (exactly one to evaluate), or if the model has a keypoint branch and the dataset no
            keypoints.
    """
    locate_sets(cfg)
    train, test = cfg.dataset.train, cfg.dataset.test
    splits = (train, test) if training else (test,)
    if training and train.json and train.json == test.json and train.images != test.images:
        raise DatasetError(f"{train.json} has two image folders: copy it for one of them")
    synthetic = cfg.dataset.get("synthetic")
    if synthetic and any(s.json and Path(s.json).is_relative_to(synthetic.root) for s in splits):
        on_main_process(lambda: _draw(synthetic))  # the others wait for the files here
    for split in splits:
        if split.json:
            split.names = [register_coco_dataset(split.json, split.images)]
        elif split.images:
            raise DatasetError(
                f"images={split.images!r} is set without json: give the annotation file too"
            )
        for name in split.names:
            check_exists(name)
    if len(test.names) > 1 or not (train if training else test).names:
        raise DatasetError(
            f"there must be at least one training set, found {list(train.names)}, and one test "
            f"set, which is optional in training, found {list(test.names)} "
            "(dataset.train.names, dataset.test.names)"
        )
    names = (train if training else test).names
    _fit_model(cfg, names)
    keep_metadata(cfg, names[0])


@contextmanager
def images_left(cfg: DictConfig) -> Iterator[None]:
    """Around what loads the training set of a config.

    Raises:
        DatasetError: if no image is left to train on, which detectron2 asserts.
    """
    try:
        yield
    except AssertionError as error:
        names, key = list(cfg.dataset.train.names), "dataloader.train.dataset.min_keypoints"
        least = OmegaConf.select(cfg, key)
        if not least:
            raise DatasetError(f"training set {names}: {error}") from error
        raise DatasetError(
            f"all {sum(len(load(name)) for name in names)} training images are left out: none has "
            f"the {least} keypoint{'' if least == 1 else 's'} that {key} asks for; set it to 0"
        ) from error


def check_initialization(cfg: DictConfig) -> None:
    """Raise a WeightsError if a training starts from no weights and leaves some layers so."""
    if cfg.train.init_checkpoint:
        return
    frozen = {}  # what freezes layers, and what does not
    for key, value in walk(OmegaConf.to_container(cfg.model, resolve=False), "model"):
        if value == "FrozenBN":
            frozen[f"{key}=FrozenBN"] = f"{key}=BN"
        elif key.endswith(".freeze_at") and value:
            frozen[f"{key}={value}"] = f"{key}=0"
        elif key.endswith(".pretrained") and value:  # a backbone that comes with weights
            return
    if frozen:
        raise WeightsError(
            f"train.init_checkpoint is empty, and {', '.join(frozen)} would freeze layers at "
            f"their initial values: give weights, or set {' '.join(frozen.values())}"
        )


def make_output_dir(cfg: DictConfig) -> None:
    """Make `train.output_dir`, if it is not there yet; every process calls this.

    Raises:
        ConfigError: if it cannot be written to.
    """
    folder = Path(cfg.train.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
            file.flush()
    except OSError as error:
        raise ConfigError(
            f"train.output_dir is {cfg.train.output_dir!r}, which cannot be written to: {error}"
        ) from error


def _draw(synthetic: Any) -> None:
    """Draw `dataset.synthetic`, if it is not there yet; what fails is a DatasetError."""
    try:
        write_dataset(**synthetic)
    except (ValueError, OSError) as error:
        raise DatasetError(f"dataset.synthetic: {error}") from error


def check_exists(name: str) -> None:
    """Raise a DatasetError for an unknown name, or a COCO file or folder that is not there."""
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), 1)
        raise DatasetError(
            f"no dataset {name!r} is registered"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + " A config file of yours can import the module that registers it"
        )
    known = MetadataCatalog.get(name)
    for file in (known.json_file, known.image_root) if has_coco_file(name) else ():
        if not os.path.exists(file):  # or where it lies may not be searched
            raise DatasetError(
                f"dataset {name!r}: {file} does not exist. Set DETECTRON2_DATASETS to the folder "
                "that holds coco/, or give dataset.train.json=... dataset.train.images=..., and "
                "dataset.test.* likewise; without a test set, dataset.split=0.1 holds out a tenth "
                "and 'dataset.test.names=[]' trains on all"
            )


def _fit_model(cfg: DictConfig, names: list[str]) -> None:
    train, test = names[0], next(iter(cfg.dataset.test.names), names[0])
    for name in (train, test):
        if not MetadataCatalog.get(name).get("thing_classes"):
            load(name)  # which may set them, as detectron2's does
        if not MetadataCatalog.get(name).get("thing_classes"):
            raise DatasetError(
                f"dataset {name!r} has no class names: where it is registered, set "
                f"MetadataCatalog.get({name!r}).thing_classes"
            )
    roi_heads = cfg.model.roi_heads
    roi_heads.num_classes = len(_same(train, test, "thing_classes"))
    if OmegaConf.select(roi_heads, "keypoint_head") is None:
        return
    keypoints = _same(train, test, "keypoint_names")
    if not keypoints:
        raise DatasetError(
            f"the model has a keypoint branch, but no category of {train!r} has keypoints"
        )
    roi_heads.keypoint_head.num_keypoints = len(keypoints)
    if OmegaConf.select(cfg, "dataloader.train.mapper.use_keypoint") is not None:  # as ours has it
        flips = create_keypoint_hflip_indices(list(names))
        cfg.dataloader.train.mapper.keypoint_hflip_indices = flips
    evaluator = cfg.dataloader.evaluator
    if not cfg.dataset.test.names or "keypoints" not in evaluator.get("tasks", ("keypoints",)):
        return
    try:  # as the evaluator will, after the training
        keypoint_oks_sigmas(test, evaluator.get("kpt_oks_sigmas"))
    except ValueError as error:
        raise DatasetError(str(error)) from error


def _same(train: str, test: str, key: str) -> list[str]:
    """A list of names that training and test set must share."""
    ours = list(MetadataCatalog.get(train).get(key) or [])
    theirs = list(MetadataCatalog.get(test).get(key) or [])
    if ours != theirs:
        differing = [f"{i}: {a!r} / {b!r}" for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
        raise DatasetError(
            f"{key} differ between training set {train!r} ({len(ours)}) and test set {test!r} "
            f"({len(theirs)}); first differences: {differing[:3] or 'the longer one has more'}"
        )
    return ours
