"""A copy of an annotation file without what is wrong in it."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.data.check import annotations
from mask_rcnn_plugin.data.check.annotations import Annotation, Context
from mask_rcnn_plugin.data.check.dataset import Checked, decoded
from mask_rcnn_plugin.data.check.findings import KINDS
from mask_rcnn_plugin.data.coco import DatasetError

_KEYPOINT_KEYS = ("keypoints", "skeleton", "keypoint_flip_map", "keypoint_sigmas")


def clean(checked: Checked, out: str | Path) -> Counter[str]:
    """Write a copy of a file in which `check_file` finds no error.

    `annotations.in_coco_form` and `repair` mend what they can; annotation ids that are missing, 0
    or taken become unused ones. Other bad annotations are dropped, and so are images and categories
    with an error, together with their annotations, and a category that only heads others. Of a
    category whose keypoints differ from an earlier one's, and of its annotations, only the
    keypoints are dropped. All else stays, also a box or area that the mask contradicts: it may be
    of the whole object behind others.

    Args:
        out: the copy, which appears whole or not at all.

    Returns:
        How often each thing was done: "dropped: annotation, box-outside", "repaired: ...".

    Raises:
        DatasetError: if the file could not be read, `out` is the file itself or cannot be written,
            or if no image, no category or none of the annotations is left.
    """
    document, out = checked.document, Path(out)
    if document is None:
        raise DatasetError(f"{checked.json_file} cannot be repaired: it is not COCO-format JSON")
    if out.resolve() == Path(checked.json_file).resolve():
        raise DatasetError(f"{out} is the checked file itself: give another name")
    done: Counter[str] = Counter()
    for kind in checked.bad_images.values():
        done[f"dropped: image, {kind}"] += 1
    images = [image for i, image in enumerate(document["images"]) if i not in checked.bad_images]
    categories = _clean_categories(checked, document["categories"], done)
    sizes = {image["id"]: checked.context.images[image["id"]] for image in images}
    context = replace(checked.context, images=sizes)
    kept = []
    for index, annotation in enumerate(map(decoded, document["annotations"])):
        if index in checked.new_ids:
            annotation = {**annotation, "id": checked.new_ids[index]}
        if index in checked.flagged or annotation["image_id"] not in sizes:
            annotation = _clean_annotation(annotation, context, done)
        if annotation is not None:
            if index in checked.new_ids:
                done["repaired: annotation id"] += 1
            kept.append(annotation)
    left = {
        "image": images,
        "category": categories,
        "annotation": "no-test-annotation" in checked.findings
        or any(not annotations.NOT_TRAINED & _kinds(entry, context) for entry in kept),
    }
    for what, is_left in left.items():
        if not is_left:
            raise DatasetError(f"{out} was not written: {checked.json_file} has no valid {what}")
    content = {**document, "images": images, "categories": categories, "annotations": kept}
    if "not-standard-json" in checked.findings or "non-finite" in checked.findings:
        content = _with_null(content)
    try:
        with atomic_write(out) as stream:
            stream.write(json.dumps(content, allow_nan=False).encode())
    except OSError as error:
        raise DatasetError(f"{out} cannot be written: {error}") from error
    return done


def _clean_categories(checked: Checked, entries: list[Any], done: Counter[str]) -> list[Any]:
    kept = []
    for index, category in enumerate(entries):
        kind = checked.bad_categories.get(index)
        if kind == "category-keypoints":
            done[f"dropped: keypoints, {kind}"] += 1
            category = {k: v for k, v in category.items() if k not in _KEYPOINT_KEYS}
        elif kind:
            done["dropped: category"] += 1
            continue
        kept.append(category)
    return kept


def _clean_annotation(annotation: Any, context: Context, done: Counter[str]) -> Annotation | None:
    """The annotation, repaired where it needs that; None to drop it."""
    named = _kinds(annotation, context)
    annotation = annotations.in_coco_form(annotation)
    found = _kinds(annotation, context)
    fatal = _errors(found) - annotations.REPAIRABLE
    if not fatal:
        size = context.images[annotation["image_id"]]
        repaired = annotations.repair(annotation, found, size)
        left = _kinds(repaired, context)
        fatal = _errors(left)
    if fatal:
        done[f"dropped: annotation, {min(fatal)}"] += 1
        return None
    for kind in named - left:
        unfit = kind in annotations.UNFIT_KEYPOINTS
        done[f"dropped: keypoints, {kind}" if unfit else f"repaired: {kind}"] += 1
    return repaired


def _kinds(annotation: Any, context: Context) -> set[str]:
    return {kind for kind, _ in annotations.inspect(annotation, context)}


def _errors(kinds: set[str]) -> set[str]:
    return {kind for kind in kinds if KINDS[kind].severity == "error"}


def _with_null(value: Any) -> Any:
    """NaN and infinities, which JSON lacks, replaced by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_with_null(v) for v in value]
    return {k: _with_null(v) for k, v in value.items()} if isinstance(value, dict) else value
