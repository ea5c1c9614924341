"""A COCO-format file in pieces, without turning all of it into Python objects at once."""

import codecs
import collections
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mask_rcnn_plugin.data.check.findings import Findings

LISTS = ("images", "annotations", "categories")
_Raw = msgspec.Raw
_decode = msgspec.json.Decoder().decode


@dataclass
class CocoFile:
    """The entries of the three lists, and the rest, as the bytes that stand in the file."""

    images: list[_Raw] = field(default_factory=list)
    annotations: list[_Raw] = field(default_factory=list)
    categories: list[_Raw] = field(default_factory=list)
    others: dict[str, _Raw] = field(default_factory=dict)


def read(json_file: str | Path, findings: Findings) -> CocoFile | None:
    """Read a file; None, and a finding that says why, if it is not of COCO's format.

    Takes the file's size in memory and some 80 bytes for each annotation. NaN and Infinity, which
    are not JSON but Python's own reader takes, become 1e999, which Python reads as infinite.
    """
    try:
        content = Path(json_file).read_bytes()
    except (OSError, ValueError) as error:
        findings.add("not-readable", "", str(error))
        return None
    try:
        if not content.isascii():
            # In pieces, as the whole decoded would take the memory again, up to four times.
            pieces = (content[i : i + 2**20] for i in range(0, len(content), 2**20))
            collections.deque(codecs.iterdecode(pieces, "utf-8"), maxlen=0)
    except UnicodeDecodeError as error:
        findings.add("not-json", "", f"not UTF-8: {error.reason}, byte {error.object[error.start]}")
        return None
    try:
        parts = _parse(content)
    except (msgspec.DecodeError, RecursionError):
        content, replaced = _finite(content)
        try:
            parts = _parse(content)
        except (msgspec.DecodeError, RecursionError) as error:
            _explain(error, content, findings)
            return None
        if replaced:
            findings.add("not-standard-json", "", f"{replaced} such values")
    lists: dict[str, list[_Raw]] = {"annotations": []}  # a test set may have none
    for key in LISTS:
        if key not in parts:
            if key not in lists:
                findings.add("not-coco", "", f"no list {key!r}, only {sorted(parts)[:8]}")
                return None
            continue
        try:
            lists[key] = msgspec.json.decode(parts.pop(key), type=list[_Raw])
        except msgspec.DecodeError as error:
            findings.add("not-coco", "", f"{key!r} must be a list: {error}")
            return None
    if not lists["categories"]:
        findings.add("not-coco", "", "'categories' is empty")
        return None
    return CocoFile(**lists, others=parts)


def decode(raw: _Raw) -> Any:
    """An entry as Python's own reader would give it."""
    try:
        return _decode(raw)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:  # numbers too large for a float, and halves of a surrogate pair
        return json.loads(bytes(raw))
    except (ValueError, RecursionError):
        return bytes(raw).decode("latin-1")


def _parse(content: bytes) -> dict[str, _Raw]:
    return msgspec.json.decode(content, type=dict[str, _Raw])


def _finite(content: bytes) -> tuple[bytes, int]:
    """The content with other words for what is not finite, and how many there were."""
    count = 0

    def replace(match: re.Match[bytes]) -> bytes:
        nonlocal count
        token = match.group()
        if token.startswith(b'"'):
            return token
        count += 1
        return b"-1e999" if token.startswith(b"-") else b"1e999"

    if b"NaN" in content or b"Infinity" in content:
        # Strings are matched too, so that the words in them are left alone.
        content = re.sub(rb'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', replace, content, flags=re.DOTALL)
    return content, count


def _explain(error: Exception, content: bytes, findings: Findings) -> None:
    if isinstance(error, msgspec.ValidationError):
        findings.add("not-coco", "", f"the file must hold one object: {error}")
        return
    position = re.search(r"\(byte (\d+)\)", str(error))
    text = "the file is empty" if not content.strip() else str(error)
    if content.startswith(b"\xef\xbb\xbf"):
        text = "the file starts with a byte order mark: save it as UTF-8 without one"
    elif position:
        at = int(position[1])
        line = content.count(b"\n", 0, at) + 1
        column = at - content.rfind(b"\n", 0, at)
        excerpt = content[max(at - 30, 0) : at + 10].decode("utf-8", "replace")
        text += f", line {line}, column {column}, near {excerpt!r}"
    elif "truncated" in text:
        text += f", after {content[-30:].decode('utf-8', 'replace')!r}"
    findings.add("not-json", "", text)
