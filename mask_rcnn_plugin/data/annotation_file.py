"""COCO's annotation files, decoded fast, and once for all that read one at a training's start."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mask_rcnn_plugin.data.garbage import collection_paused

_Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Number = Annotated[int, Meta(ge=-(2**53), le=2**53)] | float  # as a float the same


class Annotation(msgspec.Struct, gc=False):
    """What an annotation usually is in JSON; other keys are ignored."""

    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: Annotated[list[_Number], Meta(min_length=4, max_length=4)]
    area: _Number
    segmentation: list[list[_Number]] | dict[str, Any] | UnsetType = UNSET
    keypoints: list[_Number] | UnsetType = UNSET
    num_keypoints: int | UnsetType = UNSET
    iscrowd: Literal[0, 1] | UnsetType = UNSET
    ignore: Literal[0] | UnsetType = UNSET


class Image(TypedDict):
    """An entry of a file's "images"."""

    id: _Id
    file_name: str
    height: _Id
    width: _Id


class Document(msgspec.Struct):
    """A file of such annotations; other keys are ignored."""

    images: list[Image]
    categories: list[Any]
    annotations: list[Annotation] = []


_kept: dict[tuple[str, int, int], Document | None] | None = None  # by path, time and size


def keep_decoded(keep: bool) -> None:
    """Keep the next file to be registered, for all that read it; False lets it go again."""
    global _kept
    _kept = {} if keep else None


def kept_document(json_file: str, *, decode: bool = False) -> Document | None:
    """What is kept of a file, not to be changed; `decode`: keep it now, if none is kept yet."""
    if _kept is None:
        return None
    status = Path(json_file).stat()
    key = json_file, status.st_mtime_ns, status.st_size
    if decode and not _kept:
        _kept[key] = decode_document(json_file)
    return _kept.get(key)


def decode_document(json_file: str) -> Document | None:
    """A file's content; None if there is something else in it."""
    content = Path(json_file).read_bytes()
    with suppress(ValueError, RecursionError), collection_paused():
        content.isascii() or content.decode()  # in what is not decoded, msgspec takes any
        return msgspec.json.decode(content, type=Document)
    return None


def read_parts(path: Path, *names: str) -> Any:
    """The entries of a JSON file; only those with these names are sure to be decoded.

    Without the annotations that takes a twentieth of the time.

    Raises:
        OSError, ValueError, RecursionError: if it cannot be read or is not JSON.
    """
    content = path.read_bytes()
    try:
        parts = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        return {k: msgspec.json.decode(v) if k in names else v for k, v in parts.items()}
    except (ValueError, RecursionError):  # NaN, which Python's reader takes
        return json.loads(content)
