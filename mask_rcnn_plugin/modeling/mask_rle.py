"""From soft M x M masks in their boxes to COCO run-length encodings, one instance at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.layers import paste_masks_in_image
from pycocotools import mask as coco_mask
from torch import Tensor


def encode_masks(
    probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Resize each mask to its box, binarise it at `threshold` (Sec. 3.1) and encode it.

    The encodings are byte for byte those of detectron2's `paste_masks_in_image` and pycocotools,
    but no more than one H x W bitmap exists at a time.

    Args:
        probs: (R, M, M), probabilities.
        boxes: (R, 4), pixels of the image, and inside it.
        image_size: (H, W).

    Returns:
        R COCO RLEs, {"size": [H, W], "counts": str}.
    """
    rles = []
    for prob, box in zip(probs[:, None].cpu().float(), boxes[:, None].cpu().float()):
        bitmap = paste_masks_in_image(prob, box, image_size, threshold)[0]
        rle = coco_mask.encode(np.asfortranarray(bitmap.numpy(), dtype=np.uint8))
        rle["counts"] = rle["counts"].decode("ascii")
        rles.append(rle)
    return rles


class RLEMasks:
    """R masks kept as COCO RLEs; a field of detectron2's `Instances`.

    Reads like a list of bitmaps, decoded when asked for, so that detectron2's `Visualizer` and
    `COCOEvaluator` take it in place of a bool tensor (R, H, W).
    """

    def __init__(self, rles: list[dict[str, Any]]) -> None:
        self.rles = rles

    def __repr__(self) -> str:
        return f"RLEMasks({len(self)} masks)"

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._decode(rle) for rle in self.rles)

    def __getitem__(self, item: Any) -> Any:
        """An int, or a tensor of one, gives one bool tensor (H, W); a slice, a list or tensor of
        indices or a bool tensor (R,) gives the `RLEMasks` of those."""
        if isinstance(item, (int, np.integer)) or (isinstance(item, Tensor) and item.dim() == 0):
            return self._decode(self.rles[int(item)])
        chosen = np.arange(len(self))[item.cpu().numpy() if isinstance(item, Tensor) else item]
        return RLEMasks([self.rles[i] for i in chosen])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All bitmaps, bool (R, H, W); detectron2's visualizer asks for them."""
        bitmaps = [mask.numpy() for mask in self] or np.zeros((0, 0, 0), dtype=bool)
        return np.asarray(bitmaps, dtype=dtype)

    def to(self, *args: Any, **kwargs: Any) -> "RLEMasks":
        """Itself: encodings live in host memory, whatever the device of the other fields."""
        return self

    def cpu(self) -> "RLEMasks":
        """Itself, as `to`."""
        return self

    @staticmethod
    def cat(masks: list["RLEMasks"]) -> "RLEMasks":
        """All masks of a list, in order; `Instances.cat` calls it."""
        return RLEMasks([rle for m in masks for rle in m.rles])

    @staticmethod
    def _decode(rle: dict[str, Any]) -> Tensor:
        return torch.from_numpy(coco_mask.decode(rle)).bool()
