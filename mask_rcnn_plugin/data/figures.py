"""What the synthetic dataset draws: people seen from the front, shapes, textures, backgrounds.

Every function draws onto a square canvas of ``size`` pixels and is pure: numbers in, arrays out.
Points are ``(x, y)`` float64 in *pixel indices*, the frame of OpenCV and of COCO's keypoints: the
centre of the top left pixel is (0, 0), which is (0.5, 0.5) in continuous image coordinates.
Colours are BGR, 0 to 255.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

Array = npt.NDArray[Any]
Colour = Array

KEYPOINTS = COCO_PERSON_KEYPOINT_NAMES
SHAPES = ("circle", "square", "star", "ring")

_SUBPIXEL_BITS = 4  # OpenCV takes fixed-point coordinates: sixteenths of a pixel
_DISC = np.stack([f(np.linspace(0, 2 * np.pi, 24, endpoint=False)) for f in (np.cos, np.sin)], 1)


@dataclass(frozen=True)
class Figure:
    """One drawn thing, the size of the image that it will be painted over.

    paint: (size, size, 3) uint8, already multiplied by alpha.
    alpha: (size, size) uint8, anti-aliased; 255 is opaque.
    keypoints: (17, 2) pixel indices in the order of `KEYPOINTS`, or None where it has none.
    covered: (17,) bool, the keypoints that the figure's own body hides, or None.
    """

    category: str
    paint: Array
    alpha: Array
    keypoints: Array | None = None
    covered: Array | None = None
    crowd: bool = False

    @property
    def mask(self) -> Array:
        """(size, size) bool: the pixels that the figure covers at least half."""
        return self.alpha >= 128

    def over(self, image: Array) -> Array:
        """A copy of a (size, size) or (size, size, 3) uint8 array, the figure painted over it."""
        x, y, width, height = cv2.boundingRect(self.alpha)
        box = np.s_[y : y + height, x : x + width]
        source = self.alpha if image.ndim == 2 else self.paint
        share = self.alpha[box].astype(np.float32) / 255
        kept = image[box] * (1 - share.reshape(*share.shape, *[1] * (image.ndim - 2)))
        painted = image.copy()
        painted[box] = np.minimum(kept + source[box] + 0.5, 255)
        return painted


def draw_shape(
    category: str, centre: Array, radius: float, angle: float, fill: Array, hole: float = 0.5
) -> Figure:
    """Draw one of `SHAPES`.

    Args:
        centre: (2,) pixel indices.
        radius: pixels, from the centre to the outermost point; smooth edges add half a pixel.
        angle: radians, clockwise as seen.
        fill: (size, size, 3) uint8, the texture that shows through the shape.
        hole: a ring's inner radius over its outer one, in (0, 1).

    Raises:
        ValueError: for a category that is not in `SHAPES`.
    """
    if category not in SHAPES:
        raise ValueError(f"category must be one of {SHAPES}, got {category!r}")
    corners = {"square": 4, "star": 10}.get(category, 64)
    turn = angle + np.arange(corners) * (2 * np.pi / corners)
    reach = np.where(np.arange(corners) % 2, 0.45, 1.0) if category == "star" else np.ones(corners)
    outlines = [centre + radius * reach[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)]
    if category == "ring":
        outlines.append(centre + hole * (outlines[0] - centre))
    alpha = np.zeros(fill.shape[:2], np.uint8)
    _fill(alpha, outlines, 255)
    paint = (fill * (alpha.astype(np.float32) / 255)[..., None]).astype(np.uint8)
    return Figure(category, paint, alpha)


class Outfit(NamedTuple):
    """A person's colours, each BGR; sleeves and shins may be of the skin's."""

    skin: Colour
    hair: Colour
    shirt: Colour
    sleeves: Colour
    trousers: Colour
    shins: Colour
    shoes: Colour


def sample_pose(rng: np.random.Generator) -> Array:
    """(17, 2) keypoints of a person one unit tall who stands upright or nearly so.

    The origin is between the hips and y points down. The person faces the viewer, so their left
    side has the larger x. Arms and legs take random angles and the body leans up to 20 degrees.
    """
    joints: dict[str, Array] = {}

    def step(side: int, degrees: float, length: float) -> Array:
        turn = np.deg2rad(degrees)  # 0 points down, 90 outwards, 180 up
        return length * rng.uniform(0.85, 1.05) * np.array([side * np.sin(turn), np.cos(turn)])

    head = _rotation(rng.uniform(-12, 12))
    gaze = rng.uniform(-0.3, 0.3)
    middle = np.array([0.0, -0.32]) + head @ [0, -0.125]
    joints["nose"] = middle + head @ [0.075 * gaze, 0.012]
    for name, side in (("left", 1), ("right", -1)):
        joints[f"{name}_eye"] = middle + head @ [0.034 * side + 0.06 * gaze, -0.018]
        joints[f"{name}_ear"] = middle + head @ [0.078 * side, 0.0]
        arm = rng.choice([rng.uniform(5, 50), rng.uniform(50, 115), rng.uniform(115, 165)])
        fold = rng.choice([rng.uniform(-80, 0), rng.uniform(0, 100)])
        joints[f"{name}_shoulder"] = np.array([0.115 * side, -0.31])
        joints[f"{name}_elbow"] = joints[f"{name}_shoulder"] + step(side, arm, 0.165)
        joints[f"{name}_wrist"] = joints[f"{name}_elbow"] + step(side, arm + fold, 0.15)
        leg = rng.choice([rng.uniform(0, 25), rng.uniform(0, 70)], p=[0.7, 0.3])
        joints[f"{name}_hip"] = np.array([0.07 * side, 0.0])
        joints[f"{name}_knee"] = joints[f"{name}_hip"] + step(side, leg, 0.235)
        bent = leg - rng.uniform(0, 0.9) * leg - rng.uniform(-5, 5)
        joints[f"{name}_ankle"] = joints[f"{name}_knee"] + step(side, bent, 0.225)
    pose = np.stack([joints[name] for name in KEYPOINTS])
    return pose @ _rotation(rng.uniform(-20, 20)).T


def draw_person(
    keypoints: Array,
    height: float,
    outfit: Outfit,
    shade: Array,
    *,
    build: float = 1.0,
    arms_behind: Sequence[str] = (),
) -> Figure:
    """Draw a person around their keypoints.

    Args:
        keypoints: (17, 2) pixel indices in the order of `KEYPOINTS`.
        height: pixels from top to toe when standing; sets the thickness of body and limbs.
        outfit: the colours.
        shade: (size, size) float in [0, 1], multiplies the colours.
        build: factor on the thickness.
        arms_behind: which of "left", "right" pass behind the body.
    """
    size = shade.shape[0]
    paint, alpha = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
    top_part = np.full((size, size), -1, np.int16)
    joints = dict(zip(KEYPOINTS, np.asarray(keypoints, np.float64), strict=True))
    parts = _body_parts(joints, height, build, outfit, arms_behind)
    for index, part in enumerate(parts):
        _fill(paint, [part.outline], part.colour)
        if part.shows is not None:
            _fill(alpha, [part.outline], 255)
            _fill(top_part, [part.outline], index, smooth=False)
    paint = (paint * shade[..., None].astype(np.float32)).astype(np.uint8)

    covered = np.zeros(len(KEYPOINTS), bool)
    for index, (name, (x, y)) in enumerate(joints.items()):
        column, row = round(x), round(y)
        if 0 <= column < size and 0 <= row < size and top_part[row, column] >= 0:
            covered[index] = name not in (parts[top_part[row, column]].shows or ())
    return Figure("person", paint, alpha, np.asarray(keypoints, np.float64), covered)


def texture(rng: np.random.Generator, size: int, colour: Colour, spread: float) -> Array:
    """(size, size, 3) uint8: a pattern between `colour` and one about `spread` from it."""
    direction = rng.normal(size=3)
    other = colour + spread * rng.random() * direction / np.linalg.norm(direction)
    near, far = (np.clip(c, 0, 255).astype(np.float32) for c in (colour, other))
    mixed: Array = near + pattern(rng, size)[..., None] * (far - near)
    return mixed.astype(np.uint8)


def pattern(rng: np.random.Generator, size: int) -> Array:
    """(size, size) float32 in [0, 1]: plain, a gradient, stripes, checks or clouds."""
    kind = rng.choice(["plain", "gradient", "stripes", "checks", "clouds"])
    if kind == "plain":
        return np.zeros((size, size), np.float32)
    if kind == "clouds":
        cells = int(rng.integers(3, 14))
        coarse = rng.random((cells, cells), np.float32)
        return np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)
    turn, period = rng.uniform(0, np.pi), size * rng.uniform(0.04, 0.12)
    line = np.arange(size, dtype=np.float32) - size / 2
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along = cos * line + sin * line[:, None]
    if kind == "gradient":
        return np.asarray(np.clip(0.5 + along / size, 0, 1))
    pace = np.float32(2 * np.pi / period)
    wave = np.sin(pace * along)
    if kind == "checks":
        across = cos * line[:, None] - sin * line
        wave = wave * np.sin(pace * across)
    return np.asarray(np.clip(0.5 + 1.5 * wave, 0, 1))


def draw_background(rng: np.random.Generator, size: int) -> Array:
    """(size, size, 3) uint8: soft colours under clutter of lines, arcs, specks and blurs."""
    image = texture(rng, size, rng.uniform(20, 235, 3), spread=120)
    for _ in range(rng.integers(0, 9)):
        start, end = rng.uniform(0, size, 2), rng.uniform(0, size, 2)
        colour = rng.uniform(0, 255, 3).tolist()
        thick = int(rng.integers(1, 2 + size // 64))
        kind = rng.choice(["line", "arc", "speck", "blur"])
        first, last = (np.rint(point).astype(int).tolist() for point in (start, end))
        if kind == "line":
            cv2.line(image, first, last, colour, thick, cv2.LINE_AA)
        elif kind == "arc":
            axes = tuple(rng.integers(size // 8, size // 2, 2).tolist())
            angles = rng.uniform(0, 360, 2)
            cv2.ellipse(image, first, axes, angles[0], 0, 150, colour, thick, cv2.LINE_AA)
        elif kind == "speck":
            cv2.circle(image, first, 1 + size // 100, colour, -1, cv2.LINE_AA)
        else:
            reach = np.float32(rng.uniform(0.06, 0.25) * size)
            line = np.arange(size, dtype=np.float32)
            fall = [np.exp(-0.5 * ((line - at) / reach) ** 2) for at in start.astype(np.float32)]
            share = 0.6 * fall[1][:, None, None] * fall[0][:, None]
            image = (image + share * (np.float32(colour) - image)).astype(np.uint8)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.5))
    return image


class _Part(NamedTuple):
    outline: Array  # (n, 2) convex, pixel indices
    colour: Colour
    shows: tuple[str, ...] | None  # keypoints seen on it; None for a mark on the part beneath


def _body_parts(
    joints: dict[str, Array],
    height: float,
    build: float,
    outfit: Outfit,
    arms_behind: Sequence[str],
) -> list[_Part]:
    """A person's parts, the farthest first."""

    def hull(points: Sequence[Array], *radii: float) -> Array:
        discs = [p + r * build * height * _DISC for p, r in zip(points, radii, strict=True)]
        return cv2.convexHull(np.concatenate(discs).astype(np.float32))[:, 0]

    arms: dict[str, list[_Part]] = {}
    legs: list[_Part] = []
    for side in ("left", "right"):
        names = [f"{side}_{j}" for j in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")]
        shoulder, elbow, wrist, hip, knee, ankle = (joints[name] for name in names)
        arms[side] = [
            _Part(hull([shoulder, elbow], 0.042, 0.034), outfit.shirt, (names[0], names[1])),
            _Part(hull([elbow, wrist], 0.034, 0.026), outfit.sleeves, (names[1], names[2])),
            _Part(hull([wrist + 0.15 * (wrist - elbow)], 0.034), outfit.skin, (names[2],)),
        ]
        toes = ankle + 0.04 * height * np.array([0.9 if side == "left" else -0.9, 0.5])
        legs += [
            _Part(hull([ankle, toes], 0.026, 0.022), outfit.shoes, (names[5],)),
            _Part(hull([knee, ankle], 0.038, 0.028), outfit.shins, (names[4], names[5])),
            _Part(hull([hip, knee], 0.052, 0.041), outfit.trousers, (names[3], names[4])),
        ]
    girdle = [joints["left_shoulder"], joints["right_shoulder"]]
    hips = [joints["left_hip"], joints["right_hip"]]
    middle = (joints["left_ear"] + joints["right_ear"]) / 2
    across = (joints["left_ear"] - joints["right_ear"]) / 2
    down = np.array([-across[1], across[0]])
    neck = (girdle[0] + girdle[1]) / 2

    def on_head(x: float, y: float, wide: float, tall: float) -> Array:
        return (
            middle
            + np.outer(x + wide * _DISC[:, 0], across)
            + np.outer(y + tall * _DISC[:, 1], down)
        )

    face = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
    dark, white = np.full(3, 30.0), np.full(3, 245.0)
    head = [
        _Part(on_head(0, -0.2, 1.08, 1.15), outfit.hair, face),
        *(_Part(on_head(x, 0, 0.22, 0.3), outfit.skin, face) for x in (-1.0, 1.0)),
        _Part(on_head(0, 0.08, 0.92, 1.1), outfit.skin, face),
        _Part(on_head(0, -0.8, 0.72, 0.36), outfit.hair, face),
    ]
    unit = float(np.linalg.norm(across))
    for eye in ("left_eye", "right_eye"):
        head.append(_Part(joints[eye] + 0.25 * unit * _DISC, white, None))
        head.append(_Part(joints[eye] + 0.14 * unit * _DISC, dark, None))
    head.append(_Part(joints["nose"] + 0.13 * unit * _DISC, 0.6 * outfit.skin, None))
    mouth = joints["nose"] + 0.42 * down
    lips = np.array([60.0, 50.0, 170.0])
    smile = np.outer(0.32 * _DISC[:, 0], across) + np.outer(0.1 * _DISC[:, 1], down)
    head.append(_Part(mouth + smile, lips, None))
    return [
        *(part for side in arms_behind for part in arms[side]),
        *legs,
        _Part(hull([neck, middle], 0.04, 0.04), outfit.skin, ()),
        _Part(
            hull([*girdle, *hips], 0.04, 0.04, 0.045, 0.045),
            outfit.shirt,
            tuple(f"{side}_{j}" for side in arms for j in ("shoulder", "hip")),
        ),
        _Part(hull(hips, 0.052, 0.052), outfit.trousers, ("left_hip", "right_hip")),
        *head,
        *(part for side in arms if side not in arms_behind for part in arms[side]),
    ]


def _rotation(degrees: float) -> Array:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cos, -sin], [sin, cos]])


def _fill(
    canvas: Array, outlines: Sequence[Array], colour: float | Colour, smooth: bool = True
) -> None:
    """Fill outlines in place, even-odd, so that an outline within another is a hole."""
    fixed = [np.rint(o * (1 << _SUBPIXEL_BITS)).astype(np.int32) for o in outlines]
    value = np.atleast_1d(np.asarray(colour, np.float64)).tolist()
    cv2.fillPoly(canvas, fixed, value, cv2.LINE_AA if smooth else cv2.LINE_8, _SUBPIXEL_BITS)
