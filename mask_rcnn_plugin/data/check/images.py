"""What can be found in the image files of a dataset."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from mask_rcnn_plugin.data.annotation_rules import Fault
from mask_rcnn_plugin.data.image_doubts import has_16_bits, is_dark, pages

_QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF's orientation that swap the sides


def missing(paths: Iterable[str]) -> set[str]:
    """Those that are no file. Each folder is listed once, no file but a link is touched."""

    @cache
    def files(folder: str) -> set[str]:
        with suppress(OSError, ValueError), os.scandir(folder or os.curdir) as entries:
            # No pipe, on which an open would wait, and no link to nothing or to itself.
            return {
                e.name for e in entries if e.is_file(follow_symlinks=False) or os.path.isfile(e)
            }
        return set()

    return {path for path in paths if os.path.basename(path) not in files(os.path.dirname(path))}


def inspect_all(paths: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[list[Fault]]:
    """`inspect` of all, with as many threads as processors: Pillow decodes without the lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(inspect, paths, sizes)
        return list(tqdm(found, "images", len(paths), unit="", disable=None, leave=False))


def inspect(path: str, size: tuple[int, int]) -> list[Fault]:
    """Open and decode an image, whose dataset says that its width and height are `size`."""
    try:
        with Image.open(path) as image:
            stored, mode, deep = image.size, image.mode, has_16_bits(image)
            transparent = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            count = pages(image)
            image.draft(None, (1, 1))  # the same bytes read, an eighth of the resolution computed
            image.load()
            pixels = np.asarray(image) >> 8 if deep else np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        return [("image-too-large", f"{path}: {error}")]
    except UnidentifiedImageError:
        return [("image-unreadable", f"{path}: not an image that Pillow can read")]
    except Exception as error:  # Pillow's decoders raise anything on broken files
        return [("image-unreadable", f"{path}: {str(error) or type(error).__name__}")]
    found: list[Fault] = []
    turned = stored[::-1] if orientation in _QUARTER_TURNS else stored
    if size == turned:
        if orientation in range(2, 9):
            found.append(("image-rotated", f"{path}: EXIF orientation {orientation}"))
    else:
        kind = "image-rotated-size" if size == stored else "image-size"
        found.append((kind, f"{path}: {turned} as read, {size} stated (width, height)"))
    if count > 1:
        found.append(("image-pages", f"{path}: {count} pages"))
    if mode not in ("I", "F") and is_dark(pixels, deep):
        found.append(("image-dark", f"{path}: the largest value read is {pixels.max()} of 255"))
    if deep:
        found.append(("image-16-bit", f"{path}: Pillow's mode {mode}"))
    elif mode in ("I", "F"):
        found.append(("image-depth", f"{path}: Pillow's mode {mode}"))
    elif transparent:
        found.append(("image-alpha", f"{path}: Pillow's mode {mode}"))
    elif mode == "CMYK":
        found.append(("image-cmyk", path))
    return found
