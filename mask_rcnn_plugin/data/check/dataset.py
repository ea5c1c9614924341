"""The check of one COCO-format dataset: its annotation file and its images."""

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress, count, islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict
from tqdm import tqdm

from mask_rcnn_plugin.data.annotation_file import Annotation, kept_document
from mask_rcnn_plugin.data.annotation_rules import category_error, image_error, shown
from mask_rcnn_plugin.data.check import annotations, images, plain
from mask_rcnn_plugin.data.check.annotations import NOT_TRAINED, UNFIT_KEYPOINTS, Context
from mask_rcnn_plugin.data.check.findings import KINDS, Finding, Findings
from mask_rcnn_plugin.data.coco import left_right_pairs, skeleton_pairs
from mask_rcnn_plugin.data.garbage import collection_paused
from mask_rcnn_plugin.errors import counted

_LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
_CHUNK = 2048  # annotations looked at together
_decode = msgspec.json.Decoder(Annotation).decode
_NOT_SCORED = ("area-missing", "polygon-dropped")  # warnings in training, refused by an evaluation


@dataclass
class Checked:
    """What is known of a dataset after its check.

    Attributes:
        document: the annotation file, `decoded` but for its annotations; None if it could not be
            read, and then nothing below is set.
        context: its sound images and categories.
        classes, keypoints: names, as detectron2 would number them.
        paths: of the images that are there, by image id.
        bad_images: by the index of an entry of "images", the kind of error in it or in its file.
        bad_categories: the same of "categories".
        objects: number of annotations that are no crowds, by image id.
        flagged: indices of annotations with findings.
        new_ids: unused ids, by the index of an annotation whose own is missing, 0 or taken.
    """

    json_file: str
    findings: Findings = field(default_factory=Findings)
    document: dict[str, Any] | None = None
    context: Context = field(default_factory=lambda: Context({}, {}))
    classes: list[str] = field(default_factory=list)
    keypoints: list[str] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)
    bad_images: dict[int, str] = field(default_factory=dict)
    bad_categories: dict[int, str] = field(default_factory=dict)
    objects: Counter[int] = field(default_factory=Counter)
    flagged: set[int] = field(default_factory=set)
    new_ids: dict[int, int] = field(default_factory=dict)

    def size(self) -> str:
        """How many entries the file has, in words."""
        if self.document is None:
            return "not read"
        return ", ".join(counted(len(self.document[k]), one, k) for k, one in _LISTS.items())


@dataclass
class _Tally:
    """What is counted over the annotations; dicts are by their index."""

    ids: dict[int, int | None] = field(default_factory=dict)
    without_mask: dict[int, object] = field(default_factory=dict)
    objects: Counter[int] = field(default_factory=Counter)  # by image, crowds apart
    categories: set[int] = field(default_factory=set)
    masked: int = 0
    labelled: bool = False  # whether a keypoint is
    used: bool = False  # whether an annotation is trained or tested on


@collection_paused()
def check_file(
    json_file: str,
    image_root: str,
    *,
    training: bool = True,
    needs_mask: bool = False,
    open_images: bool = True,
) -> Checked:
    """Check a COCO-format file, and that its image files are there.

    Args:
        json_file: path of the annotations.
        image_root: folder that the file names are relative to.
        training: whether the dataset is trained on, and so must have annotations; one that is not
            is evaluated on, and so must have areas.
        needs_mask: whether the model has a mask branch.
        open_images: whether to open and decode each image.
    """
    checked = Checked(json_file)
    checked.document = document = _read(json_file, checked.findings)
    if document is None:
        return checked
    _check_categories(checked, document["categories"])
    _check_image_entries(checked, document["images"])
    _check_image_files(checked, document["images"], image_root, open_images)
    checked.context.needs_mask = needs_mask
    try:
        tally, rest = _sift(document["annotations"], checked.context)
    except (ValueError, RecursionError):  # as of 1e999
        checked.document = document = _read(json_file, checked.findings, sparingly=False)
        if document is None:
            return checked
        tally, rest = _sift(document["annotations"], checked.context)
    _check_annotations(checked, tally, rest, training)
    return checked


def _read(json_file: str, findings: Findings, *, sparingly: bool = True) -> dict[str, Any] | None:
    """The file's content, with the three lists; None, and a finding that says why, otherwise."""
    constants = Counter[str]()

    def constant(name: str) -> float:  # Python reads NaN and Infinity, JSON has none
        constants[name] += 1
        return float(name)

    try:
        kept = kept_document(json_file) if sparingly else None
        content = b"" if kept else Path(json_file).read_bytes()
    except (OSError, ValueError) as error:
        findings.add("not-readable", text=str(error))
        return None
    try:
        document = asdict(kept) if kept else _read_sparingly(content) if sparingly else None
        if document is None:
            document = json.loads(content.decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep
        findings.add("not-json", text=str(error) if content.strip() else "the file is empty")
        return None
    if not isinstance(document, dict):
        findings.add("not-coco", text=f"the file holds {shown(document)}, must be an object")
        return None
    document.setdefault("annotations", [])  # a test set may have none
    for name in _LISTS:
        if not isinstance(document.get(name), list):
            text = f"{name!r} is {shown(document.get(name))}, must be a list; keys: "
            findings.add("not-coco", text=text + shown(sorted(document)))
            return None
    if not document["categories"]:
        findings.add("not-coco", text="'categories' is empty")
        return None
    if constants:
        findings.add("not-standard-json", text=f"{constants.total()} such values")
    return document


def _read_sparingly(content: bytes) -> dict[str, Any] | None:
    """The document, its annotations as they stand in the file: `decoded`, they are 7 times as big.

    None for what only Python's reader takes, as NaN, or can say what is wrong with.
    """
    with suppress(ValueError, RecursionError):
        content.isascii() or content.decode()  # in what is not decoded here, msgspec takes any
        parts = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        types: dict[str, Any] = {"annotations": list[msgspec.Raw]}
        return {k: msgspec.json.decode(v, type=types.get(k, Any)) for k, v in parts.items()}
    return None


def decoded(annotation: Any) -> Any:
    """An entry of a document's "annotations" as an object.

    Raises:
        ValueError, RecursionError: for what msgspec does not take; not after a check of its file.
    """
    if isinstance(annotation, Annotation):
        return msgspec.to_builtins(annotation)
    return msgspec.json.decode(annotation) if isinstance(annotation, msgspec.Raw) else annotation


def _check_categories(checked: Checked, entries: list[Any]) -> None:
    add, context = checked.findings.add, checked.context
    names: dict[int, str] = {}
    for index, category in enumerate(entries):
        text = category_error(category)
        if text:
            add("category-format", f"#{index}", text)
            checked.bad_categories[index] = "category-format"
            continue
        key, name = int(category["id"]), category["name"]
        keypoints = category.get("keypoints") or []
        if key in names:
            add("category-id-duplicate", key, f"{names[key]!r} and {name!r}")
            checked.bad_categories[index] = "category-id-duplicate"
            continue
        if name in names.values():
            add("category-name-duplicate", key, repr(name))
        names[key] = name
        context.categories[key] = bool(keypoints)
        if keypoints and checked.keypoints not in ([], keypoints):
            text = f"{name!r} has {shown(keypoints)}, an earlier one {shown(checked.keypoints)}"
            add("category-keypoints", key, text)
            checked.bad_categories[index] = "category-keypoints"
            context.categories[key] = None
        elif keypoints:
            checked.keypoints = keypoints
            context.num_keypoints = len(keypoints)
            _check_drawing_and_flips(checked, category)
    checked.classes = [names[key] for key in sorted(names)]


def _check_drawing_and_flips(checked: Checked, category: dict[str, Any]) -> None:
    keypoints, skeleton = category["keypoints"], category.get("skeleton")
    if skeleton and not skeleton_pairs(skeleton, len(keypoints)):
        checked.findings.add("category-skeleton", category["id"], f"skeleton {shown(skeleton)}")
    if "keypoint_flip_map" not in category and (alone := left_right_pairs(keypoints)[1]):
        checked.findings.add("keypoint-unpaired", category["id"], shown(alone))


def _check_image_entries(checked: Checked, entries: list[Any]) -> None:
    add, sizes = checked.findings.add, checked.context.images
    ids: dict[str, int] = {}  # by file name
    for index, image in enumerate(entries):
        text = image_error(image)
        if text:
            add("image-format", f"#{index}", text)
            checked.bad_images[index] = "image-format"
            continue
        key, name = int(image["id"]), image["file_name"]
        if key in sizes:
            add("image-id-duplicate", key, f"{checked.paths[key]} and {name}")
            checked.bad_images[index] = "image-id-duplicate"
            continue
        if ids.setdefault(name, key) != key:
            add("file-name-duplicate", key, f"{name} is image {ids[name]} too")
        sizes[key] = int(image["width"]), int(image["height"])
        checked.paths[key] = name
    if not entries:
        add("no-image")


def _check_image_files(checked: Checked, entries: list[Any], root: str, open_images: bool) -> None:
    paths = {key: os.path.join(root, name) for key, name in checked.paths.items()}
    absent = images.missing(paths.values())
    checked.paths = {key: path for key, path in paths.items() if path not in absent}
    faults = {key: [("image-missing", path)] for key, path in paths.items() if path in absent}
    if open_images:
        sizes = [checked.context.images[key] for key in checked.paths]
        faults |= zip(checked.paths, images.inspect_all(list(checked.paths.values()), sizes))
    for index, image in enumerate(entries):
        if index in checked.bad_images:
            continue
        for kind, text in faults.get(image["id"], []):
            checked.findings.add(kind, image["id"], text)
            if KINDS[kind].severity == "error":
                checked.bad_images[index] = kind


def _sift(entries: list[Any], context: Context) -> tuple[_Tally, dict[int, Any]]:
    """Count the annotations in which there is nothing to find; the rest, by index.

    Raises:
        ValueError, RecursionError: see `decoded`.
    """
    tally, rest = _Tally(), dict[int, Any]()
    bar = tqdm(entries, "annotations", unit="", mininterval=1, disable=None, leave=False)
    numbered = enumerate(bar)
    while chunk := dict(islice(numbered, _CHUNK)):
        plains = {}
        for index, entry in chunk.items():
            try:
                plains[index] = entry if isinstance(entry, Annotation) else _decode(entry)
            except (ValueError, TypeError):  # the latter for what is an object already
                decoded(entry)
                rest[index] = entry
        is_sound = plain.nothing_to_find(list(plains.values()), context)
        rest |= {i: chunk[i] for i in compress(plains, ~is_sound)}
        sound = dict(compress(plains.items(), is_sound))
        unmasked = {i: a.id for i, a in sound.items() if not a.segmentation}
        tally.used |= bool(sound)
        tally.ids |= {i: a.id for i, a in sound.items()}
        tally.objects.update(a.image_id for a in sound.values())
        tally.categories.update(a.category_id for a in sound.values())
        tally.masked += len(sound) - len(unmasked)
        tally.without_mask |= unmasked
        tally.labelled |= any(any(a.keypoints[2::3]) for a in sound.values() if a.keypoints)
    return tally, dict(sorted(rest.items()))


def _check_annotations(
    checked: Checked, tally: _Tally, rest: dict[int, Any], training: bool
) -> None:
    """Inspect those that `_sift` has left, and judge them all together."""
    add, context = checked.findings.add, checked.context
    unused = NOT_TRAINED if training else {"crowd"}
    for index, entry in rest.items():
        annotation = decoded(entry)
        found = annotations.inspect(annotation, context)
        kinds = {kind for kind, _ in found}
        tally.used |= not kinds & unused
        no_id = kinds & {"annotation-format", "annotation-id-missing"}
        where = f"#{index}" if no_id else annotation["id"]
        if found:
            checked.flagged.add(index)
            for kind, text in found:
                severity = "error" if kind in _NOT_SCORED and not training else ""
                add(kind, where, text and f"{where}: {text}", severity)
            if kinds & {"annotation-format", "unknown-image"}:
                continue
        tally.ids[index] = annotation.get("id")
        tally.objects[annotation["image_id"]] += "crowd" not in kinds
        tally.categories.add(annotation["category_id"])
        tally.masked += bool(annotation.get("segmentation"))
        if not annotation.get("segmentation") and "crowd" not in kinds:
            tally.without_mask[index] = where
        if context.num_keypoints and not tally.labelled and not kinds & UNFIT_KEYPOINTS:
            tally.labelled = any((annotation.get("keypoints") or [])[2::3])

    if 2 * checked.findings.get("box-xyxy", Finding("")).count <= tally.masked:
        context.xyxy = False
        checked.findings.rename("box-xyxy", "box-contradicts")
    checked.objects = tally.objects
    _check_ids(checked, tally.ids)
    _check_headings(checked, tally.categories)
    if not tally.used:
        add("no-annotation" if training else "no-test-annotation")
    entries = checked.document["annotations"] if checked.document else []
    if not entries:
        return
    crowds = checked.findings["crowd"].count if "crowd" in checked.findings else 0
    if 2 * crowds > len(entries):
        add("mostly-crowds", text=f"{crowds} of {len(entries)} annotations")
    if tally.masked and not context.needs_mask:
        for _, key in sorted(tally.without_mask.items()):
            add("mask-mixed", key)
    for key in context.images:
        if key not in tally.objects:
            add("image-no-annotation", key)
    if training:
        for key, name in zip(sorted(context.categories), checked.classes):
            if key not in tally.categories:
                add("category-unused", key, repr(name))
        if context.num_keypoints and not tally.labelled:
            add("keypoint-none")


def _check_headings(checked: Checked, used: set[int]) -> None:
    """Categories that only name a group of others."""
    entries = checked.document["categories"] if checked.document else []
    sound = [(i, entry) for i, entry in enumerate(entries) if i not in checked.bad_categories]
    groups = [category.get("supercategory") for _, category in sound]
    for index, category in sound:
        top = category.get("supercategory") == "none" != category["name"]
        if top and category["name"] in groups and category["id"] not in used:
            checked.findings.add("category-heading", category["id"], repr(category["name"]))
            checked.bad_categories[index] = "category-heading"


def _check_ids(checked: Checked, ids: dict[int, int | None]) -> None:
    """Annotation ids that COCO's tools cannot do with, and others in their place."""
    # detectron2 makes the same exception, for COCO's own 2014 files.
    severity = "warning" if "minival" in checked.json_file else ""
    seen = set(ids.values())
    if len(seen) == len(ids) and seen.isdisjoint((None, 0)):
        return
    seen.clear()
    wrong = []
    for index, key in sorted(ids.items()):
        if key in seen and key is not None:
            checked.findings.add("annotation-id-duplicate", key, severity=severity)
        elif key == 0:
            checked.findings.add("annotation-id-zero", 0)
        if key in seen or not key:
            wrong.append(index)
        seen.add(key)
    checked.new_ids = dict(zip(wrong, (key for key in count(1) if key not in seen)))
