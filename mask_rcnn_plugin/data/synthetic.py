"""A dataset drawn on demand: COCO's format, both tasks, nothing to download.

``python -m mask_rcnn_plugin.data.synthetic --out DIR --train 1000 --val 200 --size 128 --seed 0``
writes ``DIR/train/*.jpg``, ``DIR/val/*.jpg``, ``DIR/train.json`` and ``DIR/val.json``, and beside
these, as COCO has it, ``DIR/person_keypoints_train.json`` and ``..._val.json`` with the people
alone. An image depends on (seed, split, index, size) only, so the same arguments give the same
bytes and a larger set begins with the smaller one.

Frames: a pixel (x, y) covers [x, x + 1] x [y, y + 1] of the continuous image plane. Boxes, areas
and polygons are in that plane and describe the *visible* pixels; keypoints are, as COCO's are,
pixel indices, 0.5 less than continuous coordinates.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util
from tqdm import tqdm

from mask_rcnn_plugin.data.annotation_rules import rle_counts
from mask_rcnn_plugin.data.figures import (
    KEYPOINTS,
    SHAPES,
    Array,
    Colour,
    Figure,
    Outfit,
    draw_background,
    draw_person,
    draw_shape,
    pattern,
    sample_pose,
    texture,
)

CATEGORIES = ("person", *SHAPES)
SKELETON = (  # COCO's: pairs of 1-based indices into KEYPOINTS
    *([16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8]),
    *([7, 9], [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]),
)

_CATEGORIES: list[dict[str, Any]] = [
    {"id": i, "name": name, "supercategory": "synthetic"} for i, name in enumerate(CATEGORIES, 1)
]
_CATEGORIES[0] |= {"keypoints": KEYPOINTS, "skeleton": SKELETON}
_SPLITS = ("train", "val")
VERSION = 2  # of the drawing: raise it when the same arguments give other pictures
_MARKER = "synthetic.json"
_MIN_VISIBLE = 0.4  # share of a figure that later ones must leave visible
_MIN_AREA = 16  # pixels

Annotation = dict[str, Any]


def write_dataset(root: str | Path, *, train: int, val: int, size: int, seed: int) -> None:
    """Write the dataset below `root`, or return at once if it is there already.

    Args:
        root: a folder that does not exist, is empty, or was made by this function.
        train, val: images in each split.
        size: side of the square images, in pixels.

    Raises:
        ValueError: for an argument out of range, or if `root` holds anything other than this very
            dataset, finished or interrupted.
    """
    wanted = {"train": train, "val": val, "size": size, "seed": seed, "version": VERSION}
    for name, lowest in (("train", 0), ("val", 0), ("size", 64), ("seed", 0)):
        value = wanted[name]
        if not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    root = Path(root)
    if _claim(root, wanted):
        return
    with tqdm(total=train + val, unit="image", disable=None) as bar:
        documents = {split: _draw_split(root, split, wanted, bar) for split in _SPLITS}
    for split, document in documents.items():  # last: no half-written set looks finished
        annotations = [a for a in document["annotations"] if a["category_id"] == 1]
        people = {**document, "annotations": annotations, "categories": _CATEGORIES[:1]}
        _write(root / f"person_keypoints_{split}.json", json.dumps(people).encode())
        _write(root / f"{split}.json", json.dumps(document).encode())


def _draw_split(root: Path, split: str, wanted: dict[str, int], bar: tqdm) -> dict[str, Any]:
    """Write the images of a split; its annotation file's content."""
    images: list[dict[str, Any]] = []
    annotations: list[Annotation] = []
    size = wanted["size"]
    (root / split).mkdir(exist_ok=True)
    for index in range(wanted[split]):
        rng = np.random.default_rng([wanted["seed"], _SPLITS.index(split), index])
        image, found = draw_sample(rng, size)
        name = f"{index:06d}.jpg"
        jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        _write(root / split / name, jpeg.tobytes())
        # Ids count from 1: COCOeval takes 0 for no match.
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
        bar.update()
    info = {"description": "drawn by mask_rcnn_plugin.data.synthetic", **wanted, "split": split}
    return {"info": info, "images": images, "annotations": annotations, "categories": _CATEGORIES}


def draw_sample(rng: np.random.Generator, size: int) -> tuple[Array, list[Annotation]]:
    """Draw one image.

    Returns:
        The image, (size, size, 3) uint8 BGR, and its annotations as `annotate` gives them. One
        image in forty is empty, one in twenty has a crowd; the others have one to five objects.
    """
    image = draw_background(rng, size)
    figures: list[Figure] = []
    visible: list[Array] = []
    chance = rng.random()
    count = 0 if chance < 0.025 else int(rng.integers(1, 6))
    if 0.025 <= chance < 0.075:
        crowd = _crowd(rng, image)
        figures, visible, image = [crowd], [crowd.mask], crowd.over(image)
    for _ in range(count):
        for _attempt in range(6):
            figure = _figure(rng, image)
            left = [*(seen & ~figure.mask for seen in visible), figure.mask]
            needed = [max(_MIN_VISIBLE * f.mask.sum(), _MIN_AREA) for f in [*figures, figure]]
            if all(seen.sum() >= least for seen, least in zip(left, needed, strict=True)):
                figures, visible, image = [*figures, figure], left, figure.over(image)
                break
    grain = np.float32(rng.uniform(1, 7)) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image + grain, 0, 255).astype(np.uint8), annotate(figures)


def annotate(figures: Sequence[Figure]) -> list[Annotation]:
    """COCO annotations, without ids, of figures painted in the order given.

    Boxes (XYWH), areas and masks are of the figure's visible pixels; a hidden figure has no
    annotation. Crowds have an uncompressed RLE, rings and visible regions with holes a compressed
    one, all others polygons. People also have ``keypoints`` [x, y, v] x 17: v is 2 where the
    keypoint is visible, 1 where a later figure or the own body hides it and 0, with x = y = 0,
    outside the image (and throughout a crowd).
    """
    annotations = []
    hidden: Array = np.zeros((), bool)
    for figure in reversed(figures):
        mask = figure.mask & ~hidden
        hidden = hidden | figure.mask
        if not mask.any():
            continue
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        x, y = int(columns[0]), int(rows[0])
        annotation: Annotation = {
            "category_id": CATEGORIES.index(figure.category) + 1,
            "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
            "area": int(mask.sum()),
            "iscrowd": int(figure.crowd),
        }
        counts = mask_util.encode(np.asfortranarray(mask, np.uint8))["counts"]
        runs = np.asarray(rle_counts(counts)).tolist() if figure.crowd else counts.decode("ascii")
        polygons = None if figure.crowd or figure.category == "ring" else mask_to_polygons(mask)
        rle = {"size": list(mask.shape), "counts": runs}
        annotation["segmentation"] = polygons or rle
        if figure.category == "person":
            keypoints = _keypoints(figure, mask)
            annotation["keypoints"] = keypoints
            annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
        annotations.append(annotation)
    return annotations[::-1]


def mask_to_polygons(mask: Array) -> list[list[float]] | None:
    """Polygons [x, y, x, y, ...] along the pixels' edges, or None if the mask has a hole.

    Args:
        mask: (H, W) bool. Each 8-connected piece becomes one polygon in continuous coordinates.
    """
    # Contours run through pixel centres. On a grid of half pixels, with the edges drawn, the
    # centres of the outermost cells are the edges themselves.
    height, width = mask.shape
    grid = np.zeros((2 * height + 3, 2 * width + 3), np.uint8)
    grid[2:-1:2, 2:-1:2] = mask
    grid = cv2.dilate(grid, np.ones((3, 3), np.uint8))
    contours, tree = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if contours and (tree[..., 3] >= 0).any():
        return None
    return [((contour.reshape(-1) - 1) / 2).tolist() for contour in contours]


def _keypoints(figure: Figure, mask: Array) -> list[float]:
    if figure.keypoints is None or figure.covered is None:  # a crowd
        return [0] * (3 * len(KEYPOINTS))
    size = mask.shape[0]
    flat: list[float] = []
    for (x, y), covered in zip(figure.keypoints.round(2).tolist(), figure.covered, strict=True):
        if 0 <= x <= size - 1 and 0 <= y <= size - 1:
            flat += [x, y, 2 if mask[round(y), round(x)] and not covered else 1]
        else:
            flat += [0, 0, 0]
    return flat


def _figure(rng: np.random.Generator, image: Array) -> Figure:
    """A random figure that stands out from the part of the image that it is to cover."""
    size = image.shape[0]
    if rng.random() < 0.4:
        return _person(rng, image, size * rng.uniform(0.35, 0.9))
    return _shape(rng, image, str(rng.choice(SHAPES)), size * rng.uniform(0.09, 0.3))


def _crowd(rng: np.random.Generator, image: Array) -> Figure:
    """A cluster of small figures of one class, as one figure."""
    size = image.shape[0]
    category = str(rng.choice(CATEGORIES))
    spread = size * rng.uniform(0.08, 0.15)
    middle = rng.uniform(0.2 * size, 0.8 * size, 2)
    paint, alpha = np.zeros_like(image), np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(8, 20)):
        at = middle + spread * rng.normal(size=2) * [1.3, 0.7]
        if category == "person":
            member = _person(rng, image, size * rng.uniform(0.14, 0.22), at)
        else:
            member = _shape(rng, image, category, size * rng.uniform(0.03, 0.06), at)
        paint, alpha = member.over(paint), member.over(alpha)
    return Figure(category, paint, alpha, crowd=True)


def _shape(
    rng: np.random.Generator, image: Array, category: str, radius: float, at: Array | None = None
) -> Figure:
    low, high = np.full(2, -radius), np.full(2, radius)
    centre, behind = _place(rng, image, low, high, at)
    fill = texture(rng, image.shape[0], _colour(rng, behind), spread=60)
    turn, hole = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.65)
    return draw_shape(category, centre, radius, turn, fill, hole)


def _person(
    rng: np.random.Generator, image: Array, height: float, at: Array | None = None
) -> Figure:
    pose = height * sample_pose(rng)
    low, high = pose.min(0) - 0.08 * height, pose.max(0) + 0.06 * height
    centre, behind = _place(rng, image, low, high, at)
    shirt, trousers, shoes = (_colour(rng, behind) for _ in range(3))
    pale, dark = np.array([190.0, 215, 245]), np.array([35.0, 60, 95])
    skin = dark + rng.random() * (pale - dark)
    hair = rng.uniform(0.1, 0.9) * np.array([90.0, 150, 210]) * rng.uniform(0.3, 1, 3)
    sleeves, shins = (cloth if rng.random() < 0.5 else skin for cloth in (shirt, trousers))
    return draw_person(
        centre + pose,
        height,
        Outfit(skin, hair, shirt, sleeves, trousers, shins, shoes),
        1 - 0.3 * pattern(rng, image.shape[0]),
        build=rng.uniform(0.85, 1.3),
        arms_behind=[side for side in ("left", "right") if rng.random() < 0.25],
    )


def _place(
    rng: np.random.Generator, image: Array, low: Array, high: Array, at: Array | None
) -> tuple[Array, Colour]:
    """Where to put a figure's origin, given its extent, and the mean colour that it will cover.

    Unless the place is given, three in four figures fit in, where they can.
    """
    size = image.shape[0]
    if at is None:
        if rng.random() < 0.75 and (high - low < size - 2).all():
            at = rng.uniform(1 - low, size - 1 - high)
        else:
            at = rng.uniform(0, size, 2) - (low + high) / 2
    (x0, y0), (x1, y1) = (np.clip(at + side, 0, size - 1).astype(int) for side in (low, high))
    return at, np.asarray(image[y0 : y1 + 1, x0 : x1 + 1].mean((0, 1)))


def _colour(rng: np.random.Generator, behind: Colour) -> Colour:
    """A random colour, nine times in ten far from the one behind it."""
    nearest = 110 if rng.random() < 0.9 else 40
    colour = rng.uniform(10, 245, 3)
    while np.linalg.norm(colour - behind) < nearest:
        colour = rng.uniform(10, 245, 3)
    return colour


def _claim(root: Path, wanted: dict[str, int]) -> bool:
    """Mark `root` as holding the wanted dataset; True if it is finished already."""
    # Listed before the marker is looked for, so that two processes may start at once.
    present = [path.name for path in root.iterdir()] if root.exists() else []
    marker = root / _MARKER
    if marker.exists():
        found = json.loads(marker.read_bytes())
        if found != wanted:
            raise ValueError(
                f"root {str(root)!r} holds a dataset drawn with {found}, not {wanted}: "
                "choose another folder or delete this one"
            )
        return (root / f"{_SPLITS[-1]}.json").exists()  # written last
    if not all(name.startswith(f".{_MARKER}") for name in present):
        raise ValueError(
            f"root {str(root)!r} is not a synthetic dataset: choose a new or empty folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    _write(marker, json.dumps(wanted).encode())
    return False


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is whole whenever it exists, even if two processes write it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mask_rcnn_plugin.data.synthetic",
        description="Draw a dataset of people and shapes in COCO's format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args(arguments)
    try:
        write_dataset(args.out, train=args.train, val=args.val, size=args.size, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    for split in _SPLITS:
        document = json.loads((args.out / f"{split}.json").read_bytes())
        images, annotations = len(document["images"]), len(document["annotations"])
        print(f"{args.out / split}.json: {images} images, {annotations} annotations")


if __name__ == "__main__":
    main()
