"""A dataset given by its folder, as Roboflow, CVAT and COCO lay it out, and one split in two."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import DictConfig

from mask_rcnn_plugin.atomic_write import atomic_write
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
        if (train.json or test.json) and not dataset.get("synthetic"):  # what is drawn gives way
            raise DatasetError(
                f"dataset.folder={folder} is given beside the files of dataset.train or .test: "
                "give one or the other"
            )
        found = on_main_process(lambda: find_sets(folder))
        dataset.synthetic = None
        for name, split in (("train", train), ("test", test)):
            json_file, images = found.get(name, ("", ""))
            split.update(json=json_file, images=images, names=[])
    if share:
        if test.json:
            raise DatasetError(
                f"dataset.split={share} holds out images to test on, but {test.json} is there: "
                "leave out one of them"
            )
        if not train.json:
            raise DatasetError(f"dataset.split={share} needs a training set: dataset.train.json")
        output = Path(cfg.train.output_dir) / "split"
        files = on_main_process(lambda: split_by_image(train.json, share, output))
        train.json, test.json = files
        test.images = train.images
    if folder or share:
        dataset.update(folder=None, split=None)  # where they are now is what the config says


def find_sets(folder: str) -> dict[str, tuple[str, str]]:
    """Annotation file and image folder of a dataset's sets.

    Takes any layout whose files or their folders are named for the set, and only there two levels
    down: Roboflow's (train/_annotations.coco.json beside the images), CVAT's
    (annotations/instances_default.json, images/), COCO's (annotations/instances_train2017.json,
    train2017/) and train.json, val.json. A file that is named for none is the training set.

    Returns:
        {"train": (file, folder), "test": (file, folder)}, without "test" if there is none.

    Raises:
        DatasetError: if there is no training set, or more than one file that may be it.
    """
    root = Path(folder)
    files = [f for f in sorted([*root.glob("*.json"), *root.glob("*/*.json")]) if _is_coco(f)]
    found = {}
    for role, names in _NAMES.items():
        named = ([f for f in files if name in _words(f.relative_to(root))] for name in names)
        of_role = next(filter(None, named), [])
        if not of_role and role == "train":
            others = {*_NAMES["test"]}
            of_role = [f for f in files if not others & _words(f.relative_to(root))]
        if len(of_role) > 1:  # COCO has other annotations of the same images beside
            of_role = [f for f in of_role if not _OTHER & _words(f.relative_to(root))] or of_role
        if len(of_role) > 1:
            raise DatasetError(
                f"dataset.folder {folder!r} has several files that may be its {role} set, "
                f"{[str(f) for f in of_role]}: name one by dataset.{role}.json and .images"
            )
        if of_role:
            found[role] = (str(of_role[0]), str(_image_folder(of_role[0], root)))
    if "train" not in found:
        there = sorted(f.name for f in root.iterdir())[:10] if root.is_dir() else "no such folder"
        raise DatasetError(
            f"dataset.folder {folder!r} has no training set in COCO's format, such as train.json, "
            f"train/_annotations.coco.json or annotations/instances_train.json; there is {there}"
        )
    return found


def _words(path: Path) -> set[str]:
    return set(re.findall("[a-z]+", "/".join(path.parts).lower()))


def _is_coco(file: Path) -> bool:
    return "images" in _parts(file) and "annotations" in _parts(file)


def _parts(file: Path) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError):
        return {}


def _image_folder(file: Path, root: Path) -> Path:
    """The one of the usual folders that has the first image."""
    images = msgspec.json.decode(_parts(file)["images"])
    first = next((i.get("file_name") for i in images if isinstance(i, dict)), None)
    subset = file.stem.rpartition("_")[2]
    candidates = [
        *(file.parent, file.parent / "images", file.parent / file.stem, root / subset, root),
        *(root / "images", root / "images" / subset),
    ]
    for candidate in candidates:
        if isinstance(first, str) and (candidate / first).is_file():
            return candidate
    raise DatasetError(
        f"{file}: its first image, {first!r}, is in none of "
        f"{list(dict.fromkeys(map(str, candidates)))}: name the folder by dataset.train.images"
    )


def split_by_image(json_file: str, share: float, output: Path) -> tuple[str, str]:
    """Write train.json and test.json, with the images of a COCO file between them.

    Which images are held out depends on their names alone: the same for each run, and almost the
    same when images are added.

    Args:
        share: of the images that are held out, at least one.
        output: a folder, made if missing.

    Raises:
        DatasetError: if there is nothing to split, or the file is not COCO-format.
    """
    try:
        document = json.loads(Path(json_file).read_bytes())
        images, annotations = document["images"], document["annotations"]
        order = sorted(images, key=lambda i: hashlib.sha256(i["file_name"].encode()).digest())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(f"{json_file!r} cannot be split: {error!r}") from error
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise DatasetError(
            f"dataset.split is {share}: of the {len(order)} images of {json_file!r} that leaves "
            f"{len(order) - count} to train on"
        )
    held_out = {image["id"] for image in order[:count]}
    files = []
    for name, is_test in (("train", False), ("test", True)):

        def here(image_id: Any, is_test: bool = is_test) -> bool:
            return (image_id in held_out) == is_test

        part = {
            **document,
            "images": [i for i in images if here(i["id"])],
            "annotations": [a for a in annotations if here(a["image_id"])],
        }
        files.append(output / f"{name}.json")
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(files[-1]) as file:
            file.write(json.dumps(part).encode())
    return str(files[0]), str(files[1])
