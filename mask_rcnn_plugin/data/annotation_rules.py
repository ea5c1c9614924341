"""What makes an annotation, category or image entry unfit.

Any JSON value may stand in any place. Run-length encodings are checked before pycocotools sees
them, as it reads past the end of a broken one.
"""

import math
import numbers
import reprlib
from typing import Any

import numpy as np
import numpy.typing as npt

Fault = tuple[str, str]  # its kind, a key of `findings.KINDS`, and what is wrong


def annotation_faults(
    annotation: object,
    width: int,
    height: int,
    num_keypoints: int | None = None,
    *,
    needs_mask: bool = False,
) -> list[Fault]:
    """All that makes an annotation unfit for training, at most one fault of each part.

    Args:
        annotation: as in a COCO file, "bbox" as XYWH in image pixels, or as detectron2 loads it,
            with compressed counts as bytes and arrays for lists. Ids and categories are ignored.
        width, height: of the image, in pixels.
        num_keypoints: that each list of keypoints must have; None accepts any number.
        needs_mask: whether an annotation without "segmentation" is unfit.
    """
    if not isinstance(annotation, dict):
        return [("annotation-format", f"annotation is {shown(annotation)}, must be an object")]
    of_parts = (
        _box_fault(annotation.get("bbox"), width, height),
        _mask_fault(annotation.get("segmentation"), width, height, needs_mask),
        _keypoints_fault(annotation.get("keypoints"), num_keypoints),
    )
    return [fault for fault in of_parts if fault is not None]


def category_error(category: object) -> str | None:
    """What is wrong with an entry of a COCO file's "categories", its keypoints included."""
    if not isinstance(category, dict):
        return f"category is {shown(category)}, must be an object"
    key, name = category.get("id"), category.get("name")
    if not is_integer(key):
        return f"id is {shown(key)}, must be an integer"
    if not isinstance(name, str) or not name:
        return f"name is {shown(name)}, must be a string"
    keypoints = category.get("keypoints") or []
    if not isinstance(keypoints, list) or not all(isinstance(k, str) for k in keypoints):
        return f"keypoints are {shown(keypoints)}, must be a list of names"
    if len(set(keypoints)) < len(keypoints):
        return f"keypoints are {shown(keypoints)}, must be different names"
    pairs = category.get("keypoint_flip_map", [])
    if not isinstance(pairs, list) or not all(_is_pair(pair, keypoints) for pair in pairs):
        return f"keypoint_flip_map is {shown(pairs)}, must be a list of pairs of keypoints"
    sigmas = category.get("keypoint_sigmas")
    if sigmas is not None and not (
        isinstance(sigmas, list)
        and len(sigmas) == len(keypoints)
        and are_numbers(sigmas)
        and all(0 < sigma <= 1 for sigma in sigmas)
    ):
        expected = f"{len(keypoints)} numbers above 0 and at most 1"
        return f"keypoint_sigmas are {shown(sigmas)}, must be {expected}"
    return None


def image_error(image: object) -> str | None:
    """What is wrong with an entry of a COCO file's "images"."""
    if not isinstance(image, dict):
        return f"image is {shown(image)}, must be an object"
    if not is_integer(image.get("id")):
        return f"id is {shown(image.get('id'))}, must be an integer"
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        return f"file_name is {shown(image.get('file_name'))}, must be a string"
    for key in ("width", "height"):
        value: Any = image.get(key)
        if not is_integer(value) or not 1 <= value < 2**31:
            return f"{key} is {shown(value)}, must be a positive integer"
    return None


def _box_fault(box: object, width: int, height: int) -> Fault | None:
    box = _as_list(box)
    if box is None:
        return "box-missing", "no bbox"
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        return "box-format", f"bbox is {shown(box)}, must be 4 numbers [x, y, width, height]"
    if not are_finite(box):
        return "non-finite", f"bbox {shown(box)} is not finite"
    x, y, w, h = box
    if w < 0 or h < 0:
        return "box-negative", f"bbox {shown(box)} has a negative side, must be x, y, w, h"
    if w == 0 or h == 0:
        return "box-empty", f"bbox {shown(box)} has a side of 0"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "box-outside", f"bbox {shown(box)} is outside the image of {width} x {height}"
    return None


def _mask_fault(segmentation: object, width: int, height: int, needs_mask: bool) -> Fault | None:
    # As detectron2's loader has it, an empty list is no mask rather than a broken one.
    if segmentation is None or (isinstance(segmentation, list | dict) and not segmentation):
        return ("mask-missing", "no segmentation") if needs_mask else None
    if isinstance(segmentation, list | tuple):
        return _polygons_fault(list(segmentation), width, height)
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, width, height)
    return "mask-format", f"segmentation is {shown(segmentation)}, must be polygons or RLE"


def _polygons_fault(polygons: list[Any], width: int, height: int) -> Fault | None:
    if are_numbers(polygons):
        return "polygon-format", "segmentation is one flat list of numbers, must be a list of lists"
    outside = True
    for polygon in map(_as_list, polygons):
        if not isinstance(polygon, list) or not are_numbers(polygon):
            return "polygon-format", f"polygon is {shown(polygon)}, must be a list of numbers"
        if len(polygon) % 2 == 1:
            text = f"polygon has {len(polygon)} coordinates, must have an even number"
            return "polygon-odd", text
        if len(polygon) < 6:
            return "polygon-short", f"polygon has {len(polygon) // 2} points, must have 3 or more"
        if not are_finite(polygon):
            return "non-finite", "polygon has a coordinate that is not finite"
        xs, ys = polygon[0::2], polygon[1::2]
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        if left < -width or right > 2 * width or top < -height or bottom > 2 * height:
            corners = shown([left, top, right, bottom])
            return "polygon-outside", f"polygon over {corners} is far outside {width} x {height}"
        outside &= left >= width or top >= height or right <= 0 or bottom <= 0
    if outside:
        return "polygon-outside", f"all polygons are outside the image of {width} x {height}"
    return None


def _rle_fault(rle: dict[str, Any], width: int, height: int) -> Fault | None:
    size = _as_list(rle.get("size"))
    if not (isinstance(size, list) and len(size) == 2 and _are_ints(size)):
        return "rle-format", f"RLE size is {shown(size)}, must be [height, width]"
    if size != [height, width]:
        return "rle-size", f"RLE size is {size}, must be {[height, width]} (height, width)"
    counts = rle_counts(rle.get("counts"))
    if counts is None:
        return "rle-format", f"RLE counts are {shown(rle.get('counts'))}, which are not run lengths"
    if int(counts.sum()) != height * width:
        return "rle-sum", f"RLE counts sum to {counts.sum()}, the image has {height * width} pixels"
    return None if counts[1::2].any() else ("mask-empty", "RLE has no pixel set")


def _keypoints_fault(keypoints: object, num_keypoints: int | None) -> Fault | None:
    keypoints = _as_list(keypoints)
    if keypoints is None or keypoints == []:  # none labelled: so the loader and the mapper
        return None
    if not isinstance(keypoints, list) or not are_numbers(keypoints):
        return "keypoint-format", f"keypoints are {shown(keypoints)}, must be [x, y, v, ...]"
    if len(keypoints) % 3 or num_keypoints not in (None, len(keypoints) // 3):
        expected = "a multiple of 3" if num_keypoints is None else f"3 x {num_keypoints}"
        return "keypoint-count", f"keypoints are {len(keypoints)} numbers, must be {expected}"
    if not are_finite(keypoints):
        return "keypoint-format", "keypoints have a number that is not finite"
    return None


def rle_counts(counts: object) -> npt.NDArray[np.int64] | None:
    """Run lengths of COCO's counts, compressed or not; None for what are no run lengths."""
    counts = _as_list(counts)
    if isinstance(counts, list):
        if not _are_ints(counts):
            return None
        if counts and not (min(counts) >= 0 and max(counts) < 2**32):
            return None
        return np.array(counts, np.int64)
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogatepass")
    return _decompress(counts) if isinstance(counts, bytes) else None


def _decompress(counts: bytes) -> npt.NDArray[np.int64] | None:
    """As pycocotools' rleFrString: numbers of 5 bits a character, from the third on differences."""
    if not counts:
        return None
    bits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:  # 32: the number goes on
        return None
    last = np.flatnonzero(bits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits; a run length has 32
        return None
    place = np.arange(len(bits)) - np.repeat(first, lengths)
    numbers_ = np.add.reduceat((bits & 31) << (5 * place), first)
    numbers_ -= np.where(bits[last] & 16, np.int64(1) << (5 * lengths), 0)
    for start in (1, 2):
        np.cumsum(numbers_[start::2], out=numbers_[start::2])
    return numbers_ if numbers_.min() >= 0 and numbers_.max() < 2**32 else None


def is_integer(value: object) -> bool:
    """Whether a JSON value equals an integer of 64 bits, as 1.0 does; true and false do not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    return bool(-(2**63) <= value < 2**63 and value == int(value))


def _are_ints(values: list[Any]) -> bool:
    """Whether all are written as integers, which pycocotools insists on."""
    return all(issubclass(t, numbers.Integral) and t is not bool for t in set(map(type, values)))


def with_integers(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy with integers for such numbers as 1.0."""
    return {k: int(v) if k in keys and is_integer(v) else v for k, v in entry.items()}


def are_numbers(values: list[Any]) -> bool:
    """Whether all are numbers, finite or not, which true and false are not."""
    types = set(map(type, values))
    if types <= {int, float}:  # fast, and the rule
        return True
    return all(issubclass(t, numbers.Real) and not issubclass(t, bool | np.bool_) for t in types)


def are_finite(values: list[Any]) -> bool:
    """Whether all numbers are finite; an integer too large for a float is not."""
    try:
        return all(map(math.isfinite, values))
    except OverflowError:
        return False


def _is_pair(pair: object, names: list[str]) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(one in names for one in pair)


def _as_list(value: Any) -> Any:
    """Arrays and tuples, which dataset dicts may hold, as the flat lists that JSON has."""
    if isinstance(value, np.ndarray):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, tuple) else value


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = 6
_repr.maxstring = _repr.maxother = 40
_repr.maxlevel = 3


def shown(value: object) -> str:
    """A value for a message: short, whatever it is."""
    try:
        return _repr.repr(value)
    except ValueError:  # an integer of more digits than Python is willing to print
        return "a number with too many digits"
