"""What can be found in the image files of a data set."""

import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import ExifTags, Image
from tqdm import tqdm

from mask_rcnn_plugin.data.annotation_rules import Fault

ERRORS = {"image-unreadable", "image-size", "image-rotated-size", "image-depth"}
_GRAYSCALE = ("1", "L", "LA")
_QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF's orientation that swap the sides


def missing(root: str, file_names: Sequence[str]) -> list[int]:
    """Indices of the files that are not there; each folder is listed once, no file is touched."""
    folders: dict[str, set[str]] = {}
    absent = []
    for index, file_name in enumerate(file_names):
        folder, name = os.path.split(os.path.join(root, file_name))
        if folder not in folders:
            try:
                with os.scandir(folder) as entries:
                    folders[folder] = {entry.name for entry in entries if _is_file(entry)}
            except (OSError, ValueError):
                folders[folder] = set()
        if name not in folders[folder]:
            absent.append(index)
    return absent


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Not so for a link to nothing or to itself; nor for a pipe, which opened would wait."""
    try:
        return entry.is_file()
    except OSError:
        return False


def inspect_all(
    paths: Sequence[Path], sizes: Sequence[tuple[int, int]], *, progress: bool
) -> list[list[Fault]]:
    """`inspect` of all, with as many threads as processors: Pillow decodes without the lock."""
    with ThreadPool(os.cpu_count()) as pool:
        found = pool.imap(lambda one: inspect(*one), zip(paths, sizes), chunksize=8)
        silent = None if progress else True  # None: unless it is a terminal
        return list(tqdm(found, "images", len(paths), unit="", disable=silent, leave=False))


def inspect(path: Path, size: tuple[int, int]) -> list[Fault]:
    """Open and decode an image, and say what is found.

    Args:
        path: of the file.
        size: width and height that the data set states.
    """
    try:
        with Image.open(path) as image:
            stored, mode, kind = image.size, image.mode, image.format
            transparent = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.draft(None, (1, 1))  # the same bytes read, an eighth of the resolution computed
            image.load()
    except Exception as error:  # Pillow's decoders raise anything on broken files
        return [("image-unreadable", f"{path}: {str(error) or type(error).__name__}")]
    seen = stored[::-1] if orientation in _QUARTER_TURNS else stored
    findings: list[Fault] = []
    if size == seen:
        if orientation in range(2, 9):
            fits = "before and after" if stored == seen else "after"
            text = f"{path}: the size fits {fits} turning (EXIF orientation {orientation})"
            findings.append(("image-rotated", text))
    elif size == stored:
        text = f"{path}: {stored} in the file and stated, {seen} turned (width, height)"
        findings.append(("image-rotated-size", text))
    else:
        text = f"{path}: {seen} in the file, {size} stated (width, height)"
        findings.append(("image-size", text))
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):
        findings.append(("image-16-bit", f"{path}: Pillow's mode {mode}"))
    elif mode in ("I", "F"):
        findings.append(("image-depth", f"{path}: Pillow's mode {mode}"))
    elif transparent:
        findings.append(("image-alpha", f"{path}: Pillow's mode {mode}"))
    elif mode == "CMYK":
        findings.append(("image-cmyk", str(path)))
    elif mode == "P":
        findings.append(("image-palette", str(path)))
    elif mode in _GRAYSCALE:
        findings.append(("image-grayscale", str(path)))
    return findings
