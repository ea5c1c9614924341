"""What an image file may hold that is silently lost when it is read as one 8-bit picture."""

from typing import Any

import numpy.typing as npt
from PIL import Image


def pages(image: Image.Image) -> int:
    """How many pages or frames a file has that was opened and not loaded yet."""
    if image.format == "MPO":  # a camera's picture and its preview
        return 1
    return getattr(image, "n_frames", 1)


def has_16_bits(image: Image.Image) -> bool:
    """Whether an image is one of 16 bits that Pillow did not reduce to 8 itself."""
    # PNG has no more than 16 bits; older Pillow gives them as "I".
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def is_dark(pixels: npt.NDArray[Any], of_16_bits: bool) -> bool:
    """Whether an image is nearly black, as one of 12 bits in 16 is when its upper 8 are read."""
    least = 64 if of_16_bits else 16
    return bool(pixels[::16, ::16].max() < least and pixels.max() < least)  # a few tell of most
