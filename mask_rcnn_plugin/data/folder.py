"""A dataset given by its folder, as Roboflow, CVAT and COCO lay it out, and one split in two."""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.config.printing import flatten
from mask_rcnn_plugin.data.annotation_file import read_parts
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.main_process import on_main_process

# What sets are called, the likeliest first.
_NAMES = {"train": ("train", "training", "default"), "test": ("val", "valid", "validation", "test")}

_OTHER = {"keypoints", "captions", "stuff", "panoptic"}


def locate_sets(cfg: DictConfig) -> None:
    """Put the files of `dataset.folder` and `dataset.split` in `dataset.train` and `.test`.

    Every process calls this. The two sets of a split are written to split/ of `train.output_dir`.

    Raises:
        DatasetError: see `find_sets` and `split_by_image`; if sets are given in two ways.
    """
    dataset = cfg.dataset
    folder, share = dataset.get("folder"), dataset.get("split")
    train, test = dataset.train, dataset.test
    if folder:
        if train.json or test.json:
            raise DatasetError(
                f"dataset.folder={folder} and files of dataset.train or dataset.test are both set: "
                "give one or the other"
            )
        keypoints = OmegaConf.select(cfg, "model.roi_heads.keypoint_head") is not None
        found = on_main_process(lambda: find_sets(folder, keypoints=keypoints))
        _drop_synthetic(cfg)
        for name, split in (("train", train), ("test", test)):
            json_file, images = found.get(name, ("", ""))
            split.update(json=json_file, images=images, names=[])
    if share:
        if test.json:
            raise DatasetError(
                f"dataset.split={share} holds out images to test on, but there is a test set, "
                f"{test.json}: leave out one of them"
            )
        if not train.json:
            raise DatasetError(f"dataset.split={share} needs a training set, dataset.train.json")
        output = Path(cfg.train.output_dir) / "split"
        files = on_main_process(lambda: split_by_image(train.json, share, output))
        train.json, test.json = files
        test.images = train.images
    if folder or share:
        dataset.update(folder=None, split=None)  # where they are now is what the config says


def _drop_synthetic(cfg: DictConfig) -> None:
    """Unset `dataset.synthetic`, but keep its values elsewhere in the config: the images' size."""
    for key, value in flatten(cfg).items():
        if isinstance(value, str) and "${dataset.synthetic." in value:
            OmegaConf.update(cfg, key, OmegaConf.select(cfg, key))
    cfg.dataset.synthetic = None


def find_sets(folder: str, *, keypoints: bool = False) -> dict[str, tuple[str, str]]:
    """Annotation file and image folder of a dataset's sets.

    Takes any layout, at most one folder deep, whose files or their folders are named for the set:
    Roboflow's (train/_annotations.coco.json beside the images), CVAT's
    (annotations/instances_default.json, images/), COCO's (annotations/instances_train2017.json,
    train2017/) and train.json, val.json. A file that is named for none is the training set, as is
    one that is named for both. Beside a copy, as train_clean.json, the original is taken.

    Args:
        keypoints: of COCO's own files take those with keypoints, where there are some.

    Returns:
        File and folder under "train" and, where there is a test set, under "test".

    Raises:
        DatasetError: if there is no training set, or more than one file that may be it.
    """
    root = Path(folder)
    paths = sorted([*root.glob("*.json"), *root.glob("*/*.json")])
    images = {f: listed for f in paths if (listed := _images(f)) is not None}
    words = {f: set(re.findall("[a-z]+", str(f.relative_to(root)).lower())) for f in images}
    files, found = [*images], {}
    for role, names in _NAMES.items():
        named = ([f for f in files if name in words[f]] for name in names)
        of_role = next(filter(None, named), [])
        if not of_role and role == "train":
            of_role = [f for f in files if words[f].isdisjoint(_NAMES["test"])]
        files = [f for f in files if f not in of_role]
        if keypoints:
            of_role = [f for f in of_role if "keypoints" in words[f]] or of_role
        if len(of_role) > 1:  # COCO has other annotations of the same images beside
            of_role = [f for f in of_role if not _OTHER & words[f]] or of_role
        originals = [f for f in of_role if all(g.stem.startswith(f.stem) for g in of_role)]
        if len(originals) == 1:
            of_role = originals
        if len(of_role) > 1:
            raise DatasetError(
                f"dataset.folder {folder!r} has several files that may be its {role} set, "
                f"{[str(f) for f in of_role]}: give dataset.{role}.json and .images instead"
            )
        if of_role:
            file = of_role[0]
            found[role] = (str(file), str(_image_folder(file, images[file], root)))
    if "train" not in found:
        there = sorted(f.name for f in root.iterdir())[:10] if root.is_dir() else "no such folder"
        raise DatasetError(
            f"dataset.folder {folder!r} has no training set in COCO's format, such as train.json, "
            f"train/_annotations.coco.json or annotations/instances_train.json; found: {there}"
        )
    return found


def _images(file: Path) -> list[Any] | None:
    """The images of a COCO file; None if it is none."""
    try:
        parts = read_parts(file, "images")
    except (OSError, ValueError, RecursionError):
        return None
    is_coco = isinstance(parts, dict) and "annotations" in parts
    return parts["images"] if is_coco and isinstance(parts.get("images"), list) else None


def _image_folder(file: Path, images: list[Any], root: Path) -> Path:
    """The one of the usual folders that has most of the first images, of which some may be gone."""
    entries = (i.get("file_name") for i in images if isinstance(i, dict))
    names = list(islice((name for name in entries if isinstance(name, str)), 100))
    subset = file.stem.rpartition("_")[2]
    candidates = [
        *(file.parent, file.parent / "images", file.parent / file.stem, root / subset, root),
        *(root / "images", root / "images" / subset),
    ]
    found = [sum((folder / name).is_file() for name in names) for folder in candidates]
    if max(found):
        return candidates[found.index(max(found))]
    raise DatasetError(
        f"{file}: its first images, {names[:1]}, are in none of "
        f"{list(dict.fromkeys(map(str, candidates)))}: in place of dataset.folder, give json and "
        "images of dataset.train and dataset.test"
    )


def split_by_image(json_file: str, share: float, output: Path) -> tuple[str, str]:
    """Write train.json and test.json, with the images of a COCO file between them.

    Which images are held out depends on their names alone: the same for each run, and almost the
    same when images are added. The same split is left as it is, another is not overwritten.

    Args:
        share: of the images that are held out, at least one.
        output: a folder, made if missing.

    Raises:
        DatasetError: if there is nothing to split, if the file is not COCO-format, if another split
            is there, or if the folder cannot be written to.
    """
    try:
        document = json.loads(Path(json_file).read_bytes())
        images, annotations = document["images"], document["annotations"]
        order = sorted(images, key=lambda i: hashlib.sha256(i["file_name"].encode()).digest())
        count = max(1, round(share * len(order)))
        held_out = {image["id"] for image in order[:count]}
        parts: dict[Path, bytes] = {}
        for name, is_test in (("train", False), ("test", True)):
            part = {
                **document,
                "images": [i for i in images if (i["id"] in held_out) == is_test],
                "annotations": [a for a in annotations if (a["image_id"] in held_out) == is_test],
            }
            parts[output / f"{name}.json"] = json.dumps(part).encode()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f"{json_file!r} cannot be split ({error!r}): `python tools/check_dataset.py --json "
            f"{json_file} --images DIR` lists what is wrong"
        ) from error
    if count >= len(order):
        raise DatasetError(
            f"dataset.split is {share}, which leaves {len(order) - count} of the {len(order)} "
            f"images of {json_file!r} to train on"
        )
    for file, content in parts.items():
        if file.exists() and file.read_bytes() != content:
            raise DatasetError(
                f"dataset.split is {share}, but {file} is from another split, perhaps an earlier "
                f"training's: set another train.output_dir, or remove {output} to split anew"
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for file, content in parts.items():
            if not file.exists():
                with atomic_write(file) as stream:
                    stream.write(content)
    except OSError as error:
        raise DatasetError(
            f"dataset.split is {share}, but {output} cannot be written to ({error}): set another "
            "train.output_dir"
        ) from error
    train, test = map(str, parts)
    return train, test
