"""A copy of an annotation file without what is wrong in it."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import msgspec

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.data.check import annotations
from mask_rcnn_plugin.data.check.annotations import Annotation, Context
from mask_rcnn_plugin.data.check.files import Checked
from mask_rcnn_plugin.data.check.findings import KINDS
from mask_rcnn_plugin.data.check.reading import decode
from mask_rcnn_plugin.data.coco import DatasetError


def clean(checked: Checked, out: str | Path) -> Counter[str]:
    """Write a copy of a file in which `check_file` finds no error.

    What cannot be put right goes: an annotation; an image with a bad entry or file, and its
    annotations, also where the file is of another size than stated, as these may be of either; a
    category with a bad entry, and its annotations. Only the keypoints go of an annotation where
    they are bad, and of a category with others than an earlier one and its annotations. Put right
    are boxes and areas that are missing or broken, from the mask; unusable polygons beside usable
    ones, dropped; num_keypoints, counted; annotation ids that are 0 or taken, by unused ones. All
    else is the bytes of the original, boxes and areas that the mask contradicts too: they may be of
    the whole object behind others.

    Args:
        checked: what `check_file` says of the original.
        out: the copy. It is written beside and then renamed, so it is whole or not there.

    Returns:
        How often each thing was done: "dropped annotation: box-outside", "repaired ...".

    Raises:
        DatasetError: if the file could not be read, `out` is the file itself or cannot be written,
            or if no image, no category or none of the annotations is left.
    """
    file, out = checked.file, Path(out)
    if file is None:
        raise DatasetError(f"{checked.json_file} cannot be repaired: it is not COCO-format JSON")
    if out.resolve() == Path(checked.json_file).resolve():
        raise DatasetError(f"{out} is the checked file itself: give another name, it is kept")
    done: Counter[str] = Counter()
    images = _clean_images(checked, file.images, done)
    categories = _clean_categories(checked, file.categories, done)
    kept = []
    context = replace(checked.context, images=checked.clean_sizes)
    for index, raw in enumerate(file.annotations):
        if index in checked.flagged or index in checked.new_ids or checked.bad_images:
            mended = _clean_annotation(decode(raw), context, checked.new_ids.get(index), done)
            if mended is not None:
                kept.append(_plain(raw) if not mended else _dump(mended))
        else:
            kept.append(_plain(raw))
    left = {"image": images, "category": categories, "annotation": kept}
    if "no-test-annotation" in checked.findings:
        del left["annotation"]
    for what, entries in left.items():
        if not entries:
            raise DatasetError(f"{out} was not written: no {what} of {checked.json_file} is sound")
    try:
        with atomic_write(out) as stream:
            stream.write(b"{")
            for key, value in file.others.items():
                stream.write(json.dumps(key).encode() + b": " + _plain(value) + b",\n")
            _write_list(stream, "images", images)
            stream.write(b",\n")
            _write_list(stream, "categories", categories)
            stream.write(b",\n")
            _write_list(stream, "annotations", kept)
            stream.write(b"}\n")
    except OSError as error:
        raise DatasetError(f"{out} cannot be written: {error}") from error
    return +done


def _clean_images(checked: Checked, entries: list[msgspec.Raw], done: Counter[str]) -> list[bytes]:
    kept = []
    for index, raw in enumerate(entries):
        if index in checked.bad_images:
            done[f"dropped: image, {checked.bad_images[index]}"] += 1
        else:
            kept.append(_plain(raw))
    return kept


def _clean_categories(
    checked: Checked, entries: list[msgspec.Raw], done: Counter[str]
) -> list[bytes]:
    kept = []
    for index, raw in enumerate(entries):
        if index in checked.bad_categories:
            done["dropped: category"] += 1
        elif index in checked.other_keypoints:
            done["dropped: keypoints, category-keypoints"] += 1
            parts = {"keypoints", "skeleton", "keypoint_flip_map", "keypoint_sigmas"}
            kept.append(_dump({k: v for k, v in decode(raw).items() if k not in parts}))
        else:
            kept.append(_plain(raw))
    return kept


def _clean_annotation(
    annotation: Any, context: Context, new_id: int | None, done: Counter[str]
) -> Annotation | None:
    """The annotation put right, {} if it is to stay as it is, None to drop it."""
    found = {kind for kind, _ in annotations.inspect(annotation, context)}
    fatal = {k for k in found if KINDS[k].severity == "error"} - annotations.REPAIRABLE
    if fatal:
        done[f"dropped: annotation, {min(fatal)}"] += 1
        return None
    size = context.images[annotation["image_id"]]
    mended = annotations.repair(annotation, found, size)
    left = {kind for kind, _ in annotations.inspect(mended, context)}
    fatal = {k for k in left if KINDS[k].severity == "error"}
    if fatal:
        done[f"dropped: annotation, {min(fatal)}"] += 1
        return None
    for kind in found - left:
        unfit = kind in annotations.UNFIT_KEYPOINTS
        done[f"dropped: keypoints, {kind}" if unfit else f"repaired: {kind}"] += 1
    if new_id is not None:
        done["repaired: annotation id"] += 1
        mended["id"] = new_id
    # Both, as true == 1 and yet is no number.
    return {} if mended == annotation and found == left else mended


def _write_list(stream: IO[bytes], key: str, entries: list[bytes]) -> None:
    stream.write(f'"{key}": ['.encode())
    for index, entry in enumerate(entries):
        stream.write((b",\n" if index else b"\n") + entry)
    stream.write(b"]")


def _plain(raw: msgspec.Raw) -> bytes:
    """The bytes of an entry, but what stands for NaN or Infinity there becomes null."""
    return _dump(decode(raw)) if b"1e999" in bytes(raw) else bytes(raw)


def _dump(value: Any) -> bytes:
    return json.dumps(_finite(value)).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value
