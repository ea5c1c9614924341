"""The check of one COCO-format file and its images."""

import itertools
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mask_rcnn_plugin.data.annotation_rules import category_error, image_error, shown
from mask_rcnn_plugin.data.check import annotations, images, reading
from mask_rcnn_plugin.data.check.annotations import UNFIT_KEYPOINTS, Context
from mask_rcnn_plugin.data.check.findings import Findings
from mask_rcnn_plugin.data.check.reading import CocoFile, decode

_NOT_SCORED = ("area-missing", "polygon-dropped")  # of warnings, what an evaluation refuses
_POLYGONS, _RLE, _BARE = 1, 2, 4  # bits: what the annotations of an image have


@dataclass
class Checked:
    """What is known of a file after its check.

    Attributes:
        file: its entries; None if it could not be read, and then nothing below is filled.
        context: its sound images and categories.
        classes, keypoints: names, as detectron2 would number them.
        paths: of the sound images, by image id.
        bad_images: the kind of an error in it, by the index of an entry of "images".
        clean_sizes: width and height by image id, of the others.
        bad_categories: indices of entries of "categories" with an error.
        other_keypoints: indices of those whose only error is to have others than an earlier one.
        flagged: indices of annotations with findings.
        new_ids: unused ids by the index of the annotation whose own is 0 or taken.
    """

    json_file: str
    findings: Findings = field(default_factory=Findings)
    file: CocoFile | None = None
    context: Context = field(default_factory=lambda: Context({}, {}))
    classes: list[str] = field(default_factory=list)
    keypoints: list[str] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)
    bad_images: dict[int, str] = field(default_factory=dict)
    clean_sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    bad_categories: set[int] = field(default_factory=set)
    other_keypoints: set[int] = field(default_factory=set)
    flagged: set[int] = field(default_factory=set)
    new_ids: dict[int, int] = field(default_factory=dict)

    def size(self) -> str:
        """How many entries the file has, in words."""
        if self.file is None:
            return "not read"
        counts = ((len(getattr(self.file, name)), name) for name in reading.LISTS)
        return ", ".join(f"{count} {name}" for count, name in counts)


def check_file(
    json_file: str,
    image_root: str,
    *,
    training: bool = True,
    needs_mask: bool = False,
    open_images: bool = True,
    progress: bool = True,
) -> Checked:
    """Check a COCO-format file, and that its image files are there.

    Args:
        json_file: path of the annotations.
        image_root: folder that the file names are relative to.
        training: whether the set is to be trained on, and so must have annotations; one that is
            not is evaluated on, and so must have areas.
        needs_mask: whether the model has a mask branch.
        open_images: whether to open and decode each image.
        progress: whether to show progress bars on standard error.
    """
    checked = Checked(json_file)
    checked.file = reading.read(json_file, checked.findings)
    if checked.file is None:
        return checked
    _check_categories(checked, checked.file)
    _check_images(checked, checked.file, image_root, open_images=open_images, progress=progress)
    checked.context.needs_mask = needs_mask
    _check_annotations(checked, checked.file, training=training, progress=progress)
    return checked


def _check_categories(checked: Checked, file: CocoFile) -> None:
    add, context = checked.findings.add, checked.context
    names: dict[int, str] = {}
    with_keypoints: list[list[str]] = []
    for index, raw in enumerate(file.categories):
        category = decode(raw)
        text = category_error(category)
        if text:
            add("category-format", f"#{index}", text)
            checked.bad_categories.add(index)
            continue
        key, name, keypoints = category["id"], category["name"], category.get("keypoints") or []
        if key in names:
            add("category-id-duplicate", key, f"{names[key]!r} and {name!r}")
            checked.bad_categories.add(index)
            continue
        if name in names.values():
            add("category-name-duplicate", key, repr(name))
        names[key] = name
        context.categories[key] = bool(keypoints)
        if with_keypoints and keypoints not in ([], with_keypoints[0]):
            text = f"{name!r} has {shown(keypoints)}, an earlier one {shown(with_keypoints[0])}"
            add("category-keypoints", key, text)
            checked.other_keypoints.add(index)
            context.categories[key] = None
        elif keypoints:
            with_keypoints.append(keypoints)
    checked.classes = [names[key] for key in sorted(names)]
    if with_keypoints:
        checked.keypoints = with_keypoints[0]
        context.num_keypoints = len(checked.keypoints)


def _check_images(
    checked: Checked, file: CocoFile, image_root: str, *, open_images: bool, progress: bool
) -> None:
    add, sizes = checked.findings.add, checked.context.images
    names: dict[str, int] = {}
    indices: list[int] = []  # of the sound entries, in the order of `sizes`
    for index, raw in enumerate(file.images):
        image = decode(raw)
        text = image_error(image)
        if text:
            add("image-format", f"#{index}", text)
            checked.bad_images[index] = "image-format"
            continue
        key, name = image["id"], image["file_name"]
        if key in sizes:
            add("image-id-duplicate", key, f"{checked.paths[key]} and {name}")
            checked.bad_images[index] = "image-id-duplicate"
            continue
        if name in names:
            add("file-name-duplicate", key, f"{name} is image {names[name]} too")
        names.setdefault(name, key)
        sizes[key] = image["width"], image["height"]
        checked.paths[key] = name
        indices.append(index)

    if not file.images:
        add("no-image")
    keys = list(sizes)
    absent = set(images.missing(image_root, list(checked.paths.values())))
    checked.paths = {key: os.path.join(image_root, name) for key, name in checked.paths.items()}
    bad = dict.fromkeys(absent, "image-missing")
    for i in sorted(absent):
        add("image-missing", keys[i], checked.paths[keys[i]])
    if open_images:
        here = [i for i in range(len(keys)) if i not in absent]
        paths = [Path(checked.paths[keys[i]]) for i in here]
        found = images.inspect_all(paths, [sizes[keys[i]] for i in here], progress=progress)
        for i, faults in zip(here, found):
            for kind, text in faults:
                add(kind, keys[i], text)
                if kind in images.ERRORS:
                    bad[i] = kind
    checked.bad_images |= {indices[i]: kind for i, kind in bad.items()}
    checked.clean_sizes = {keys[i]: sizes[keys[i]] for i in range(len(keys)) if i not in bad}


def _check_annotations(checked: Checked, file: CocoFile, *, training: bool, progress: bool) -> None:
    add, context = checked.findings.add, checked.context
    ids = np.zeros(len(file.annotations), np.int64)
    sound = np.zeros(len(file.annotations), bool)  # where `ids` has one
    of_category: Counter[int] = Counter()
    masks = dict.fromkeys(context.images, 0)  # bits by image
    bare: list[int] = []  # ids of annotations without a mask
    labelled = False
    bar = tqdm(
        file.annotations,
        "annotations",
        unit="",
        mininterval=1,
        disable=None if progress else True,
        leave=False,
    )
    for index, raw in enumerate(bar):
        annotation = decode(raw)
        faults = annotations.inspect(annotation, context)
        if faults:
            checked.flagged.add(index)
            where = f"#{index}" if faults[0][0] == "annotation-format" else annotation["id"]
            for kind, text in faults:
                severity = "error" if kind in _NOT_SCORED and not training else ""
                add(kind, where, text and f"{where}: {text}", severity)
            if faults[0][0] in ("annotation-format", "unknown-image"):
                continue
        key, image_id = annotation["id"], annotation["image_id"]
        ids[index], sound[index] = key, True
        of_category[annotation["category_id"]] += 1
        segmentation = annotation.get("segmentation")
        if segmentation:
            masks[image_id] |= _RLE if isinstance(segmentation, dict) else _POLYGONS
        else:
            masks[image_id] |= _BARE
        if annotation.get("iscrowd") == 1:
            add("crowd", key)
        elif not segmentation:
            bare.append(key)
        if context.num_keypoints and not labelled:
            keypoints = annotation.get("keypoints")
            unfit = any(kind in UNFIT_KEYPOINTS for kind, _ in faults)
            labelled = bool(keypoints) and not unfit and any(keypoints[2::3])

    _check_ids(checked, ids, sound)
    if not file.annotations:
        add("no-annotation" if training else "no-test-annotation")
        return
    bits = set(masks.values())
    if not context.needs_mask and any(b & (_POLYGONS | _RLE) for b in bits):
        for key in bare:
            add("mask-mixed", key)
    for image_id, bit in masks.items():
        if bit == 0:
            add("image-no-annotation", image_id)
        elif bit & _POLYGONS and bit & _RLE:
            add("mask-kinds", image_id)
    if training:
        for key in sorted(context.categories.keys() - of_category.keys()):
            add(
                "category-unused", key, repr(checked.classes[sorted(context.categories).index(key)])
            )
        if context.num_keypoints and not labelled:
            add("keypoint-none")


def _check_ids(checked: Checked, ids: npt.NDArray[np.int64], sound: npt.NDArray[np.bool_]) -> None:
    """Annotation ids that COCO's tools cannot do with, and others in their place."""
    indices = np.flatnonzero(sound)
    _, first = np.unique(ids[indices], return_index=True)
    repeated = np.delete(indices, first)
    # detectron2 makes the same exception, for COCO's own 2014 files.
    severity = "warning" if "minival" in checked.json_file else ""
    for key in ids[repeated].tolist():
        checked.findings.add("annotation-id-duplicate", key, severity=severity)
    zeros = indices[ids[indices] == 0]
    if len(zeros):
        checked.findings.add("annotation-id-zero", 0)
    wrong = sorted({*repeated.tolist(), *zeros.tolist()})
    if wrong:
        taken = set(ids[indices].tolist())
        unused = (i for i in itertools.count(1) if i not in taken)
        checked.new_ids = dict(zip(wrong, unused))
