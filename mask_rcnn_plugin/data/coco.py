"""COCO's splits under the paper's names, and a user's own COCO-format dataset.

detectron2 registers COCO itself, below $DETECTRON2_DATASETS (./datasets if unset):
DATASETS/coco/{train2014,val2014,train2017,val2017,test2017,annotations}.
"""

import logging
import operator
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from msgspec import UNSET
from msgspec.structs import asdict
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.data.annotation_file import decode_document, kept_document, read_parts
from mask_rcnn_plugin.data.annotation_rules import category_error, image_error, shown, with_integers
from mask_rcnn_plugin.data.garbage import collection_paused
from mask_rcnn_plugin.errors import UserError

logger = logging.getLogger(__name__)

# Sec. 4: the 80k training images and 35k of validation (2014), the remaining 5k to validate; the
# 2017 release has the same split as coco_2017_train and coco_2017_val.
TRAINVAL35K = ("coco_2014_train", "coco_2014_valminusminival")
MINIVAL = ("coco_2014_minival",)
TEST_DEV = ("coco_2017_test-dev",)

# Sec. 5: the same images with the person category and its keypoints.
KEYPOINT_TRAINVAL35K = tuple(f"keypoints_{name}" for name in TRAINVAL35K)
KEYPOINT_MINIVAL = tuple(f"keypoints_{name}" for name in MINIVAL)
KEYPOINT_TEST_DEV = ("keypoints_coco_2017_test-dev",)


class DatasetError(UserError):
    """An annotation file or image folder that cannot be used; the message names it."""


def _register_keypoint_test_dev() -> None:
    """`KEYPOINT_TEST_DEV`, which detectron2 lacks: test-dev's images, person metadata."""
    (name,), (images,) = KEYPOINT_TEST_DEV, TEST_DEV
    files = {k: getattr(MetadataCatalog.get(images), k) for k in ("json_file", "image_root")}
    # Without a dataset name, so that the file's 80 categories do not replace the one.
    DatasetCatalog.register(name, partial(load_coco_json, **files))
    person = MetadataCatalog.get("keypoints_coco_2017_val").as_dict()
    ids = {"thing_dataset_id_to_contiguous_id": {1: 0}}  # COCO's id of person
    MetadataCatalog.get(name).set(**{**person, **files, **ids, "name": name})


def register_coco_dataset(json_file: str, image_root: str) -> str:
    """Register a COCO-format annotation file with detectron2.

    Classes are the file's categories in the order of their ids. Keypoint names and skeleton come
    from the categories' "keypoints" and "skeleton" as in COCO; left-right pairs from the names, see
    `left_right_pairs`, unless a category has a "keypoint_flip_map", a list of pairs of names; OKS
    sigmas from "keypoint_sigmas".

    Args:
        json_file: path of the annotations.
        image_root: folder that the file names in it are relative to.

    Returns:
        Name of the dataset in detectron2's catalogs, which is the path of `json_file`. Registering
        the same file again is harmless and reads its categories anew.

    Raises:
        DatasetError: if the file or folder does not exist or the file is not COCO-format.
    """
    categories = _read_categories(json_file)
    if not image_root:
        raise DatasetError(f"no image folder given for {json_file}: set images as well as json")
    if not Path(image_root).is_dir():
        raise DatasetError(f"image folder {image_root!r} (of {json_file}) does not exist")
    name = str(json_file)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    metadata = {
        "thing_classes": [c["name"] for c in categories],
        # Else set by the first loading, before which an evaluator would take classes for ids.
        "thing_dataset_id_to_contiguous_id": {int(c["id"]): i for i, c in enumerate(categories)},
        **_keypoints(name, categories),
    }
    DatasetCatalog.register(name, partial(_load, name, str(image_root)))
    MetadataCatalog.get(name).set(
        json_file=name, image_root=str(image_root), evaluator_type="coco", **metadata
    )
    return name


def has_coco_file(name: str) -> bool:
    """Whether a registered dataset is read from a COCO file, not by a loader of its own."""
    loader, known = DatasetCatalog[name], MetadataCatalog.get(name).as_dict()
    module = getattr(loader, "func", loader).__module__
    ours = module in (__name__, load_coco_json.__module__)
    return ours and {"json_file", "image_root"} <= known.keys()


def load(name: str) -> list[dict[str, Any]]:
    """The records of a registered dataset.

    Raises:
        DatasetError: if its loader fails, whatever it raises.
    """
    try:
        return DatasetCatalog.get(name)
    except DatasetError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise DatasetError(f"dataset {name!r}: its loader failed with {what}") from error


def _load(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """detectron2's `load_coco_json`, which fails in many ways on a broken file, with one error."""
    try:
        with collection_paused():
            records = _records(json_file, image_root)
            if records is not None:
                return records
            records = load_coco_json(json_file, image_root, json_file, extra_annotation_keys=["id"])
    except Exception as error:
        raise DatasetError(
            f"annotation file {json_file!r} cannot be loaded ({type(error).__name__}: {error}): "
            f"`python tools/check_dataset.py --json {json_file} --images {image_root} "
            "--fix OUT.json` lists what is wrong and writes a repaired copy"
        ) from error
    for record in records:
        record.update(with_integers(record, "image_id", "width", "height"))
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0) is None:  # a crowd to detectron2
                annotation["iscrowd"] = 0
    return records


def _records(json_file: str, image_root: str) -> list[dict[str, Any]] | None:
    """What `load_coco_json` gives, in half the time; None where it may warn or refuse."""
    document = kept_document(json_file) or decode_document(json_file)
    if document is None:
        return None
    categories = sorted(document.categories, key=lambda category: category["id"])
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    of_file = contiguous, [category["name"] for category in categories]
    known = MetadataCatalog.get(json_file)
    if of_file != (known.get("thing_dataset_id_to_contiguous_id"), known.get("thing_classes")):
        return None
    records, of_image = [], dict[int, list[dict[str, Any]]]()
    for image in sorted(document.images, key=lambda image: image["id"]):
        found = of_image[image["id"]] = []
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "annotations": found,
            }
        )
    seen = {annotation.id for annotation in document.annotations}
    if len(of_image) < len(records) or len(seen) < len(document.annotations):
        return None
    for annotation in document.annotations:
        if annotation.image_id not in of_image or annotation.category_id not in contiguous:
            return None
        loaded = {
            "id": annotation.id,
            "bbox": annotation.bbox,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": contiguous[annotation.category_id],
        }
        if annotation.iscrowd is not UNSET:
            loaded["iscrowd"] = annotation.iscrowd
        if annotation.keypoints is not UNSET:  # indices of pixels become coordinates
            half = cycle((0.5, 0.5, 0))
            loaded["keypoints"] = list(map(operator.add, annotation.keypoints, half))
        if mask := annotation.segmentation:
            if isinstance(mask, list):
                mask = [p for p in mask if len(p) >= 6 and len(p) % 2 == 0]
                if not mask:
                    return None
            elif isinstance(mask["counts"], list):
                mask = coco_mask.frPyObjects(mask, *mask["size"])
            loaded["segmentation"] = mask
        of_image[annotation.image_id].append(loaded)
    logger.info("Loaded %d images from %s", len(records), json_file)
    return records


def _read_categories(json_file: str) -> list[dict[str, Any]]:
    """The categories of a COCO-format file, by id."""
    path = Path(json_file)
    try:
        if not path.is_file():
            beside = sorted(file.name for file in path.parent.glob("*.json")) or "no .json"
            raise DatasetError(
                f"annotation file {json_file!r} does not exist; {path.parent} has {beside}"
            )
        document = kept_document(json_file, decode=True)
        file = asdict(document) if document else read_parts(path, "images", "categories")
    except DatasetError:
        raise
    except OSError as error:
        raise DatasetError(f"annotation file {json_file!r} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"annotation file {json_file!r} is not JSON: {error}") from error
    if not isinstance(file, dict) or not isinstance(file.get("images"), list):
        raise DatasetError(
            f"annotation file {json_file!r} is not COCO-format: 'images' must be a list"
        )
    categories = file.get("categories")
    if not isinstance(categories, list) or not categories:
        raise DatasetError(
            f"annotation file {json_file!r} is not COCO-format: 'categories' must be a list of "
            "objects with 'id' and 'name', and not empty"
        )
    for what, entries, entry_error in (
        ("categories", categories, category_error),
        ("images", file["images"], image_error),
    ):
        for entry in entries:
            wrong = entry_error(entry)
            if wrong:
                raise DatasetError(f"annotation file {json_file!r}, {shown(entry)}: {wrong}")
        if len({entry["id"] for entry in entries}) < len(entries):
            raise DatasetError(
                f"annotation file {json_file!r}: some of its {what} have the same id"
            )
    return sorted(categories, key=lambda c: c["id"])


def _keypoints(name: str, categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Keypoint metadata of a file, {} if no category has keypoints."""
    with_keypoints = [c for c in categories if c.get("keypoints")]
    if not with_keypoints:
        return {}
    category = with_keypoints[0]
    names = category["keypoints"]
    for other in with_keypoints[1:]:
        if other["keypoints"] != names:
            raise DatasetError(
                f"{name}: categories {category['name']!r} and {other['name']!r} have different "
                "keypoints; one keypoint branch predicts one list of keypoints"
            )
    metadata = {
        "keypoint_names": names,
        "keypoint_classes": [c["name"] for c in with_keypoints],
        "keypoint_flip_map": [
            tuple(pair) for pair in category.get("keypoint_flip_map", left_right_pairs(names)[0])
        ],
        # The colour is detectron2's visualizer's business.
        "keypoint_connection_rules": [
            (names[a], names[b], (102, 204, 255))
            for a, b in skeleton_pairs(category.get("skeleton"), len(names))
        ],
    }
    if category.get("keypoint_sigmas") is not None:
        metadata["keypoint_oks_sigmas"] = [float(s) for s in category["keypoint_sigmas"]]
    return metadata


def left_right_pairs(names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Names that mirror each other, and those that name a side but have no partner.

    A side is the word "left" or "right" in a name, or else "l" or "r", however words are set apart:
    left_eye, L_Eye, "Left Eye", leftEye, lefteye, LEye, eye.l.
    """
    sides: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        spaced = re.sub(r"(?<=[^\W_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
        spaced = re.sub(r"(?<![^\W_])(left|right)", r"\1 ", spaced, flags=re.IGNORECASE)
        words = re.findall(r"[^\W_]+", spaced.lower())
        found = [i for i, word in enumerate(words) if word in ("left", "right")]
        found = found or [i for i, word in enumerate(words) if word in ("l", "r")]
        if len(found) == 1:
            side = words.pop(found[0])[0]
            sides.setdefault((*words, str(found[0])), {}).setdefault(side, name)
    pairs = [(both["l"], both["r"]) for both in sides.values() if len(both) == 2]
    alone = [name for both in sides.values() if len(both) == 1 for name in both.values()]
    return pairs, alone


def skeleton_pairs(skeleton: object, num_keypoints: int) -> list[tuple[int, int]]:
    """Which keypoints are joined in drawings, counted from 0.

    COCO's skeletons count from 1, others from 0; one that has a 0 does. [] for no list of pairs of
    keypoints: drawings then have points alone.
    """
    if not isinstance(skeleton, list):
        return []
    pairs = [pair for pair in skeleton if isinstance(pair, list) and len(pair) == 2]
    first = 0 if any(0 in pair for pair in pairs) else 1
    allowed = range(first, first + num_keypoints)
    joined = list(chain(*pairs))
    if len(pairs) < len(skeleton) or any(type(k) is not int or k not in allowed for k in joined):
        return []
    return [(a - first, b - first) for a, b in pairs]


# As detectron2 registers COCO's other sets: on import, for its own scripts too.
_register_keypoint_test_dev()
