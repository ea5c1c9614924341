"""Masks that stay run-length encoded and answer as the bool tensor (R, H, W) would.

100 masks of an 800 x 1088 image are 87 MB as bitmaps and tens of kilobytes encoded.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

_BITMAP_INSTEAD = 'mask_format="bitmap" (OUTPUT_FORMAT: bitmap in YAML) gives a tensor that does'


class RLEMasks(Tensor):
    """R masks kept as COCO RLEs: a bool tensor (R, H, W) without the memory.

    Every operator of torch takes it, and so does whatever reads detectron2's `pred_masks`:

    * a slice, a bool tensor or a list of indices, `torch.cat`, `detach` and `to(device)` give
      `RLEMasks` and decode nothing;
    * `sum` and `any` over the image read areas off the encodings, `any` over the masks merges them;
    * an integer index decodes one mask, an iteration one after the other;
    * everything else decodes all masks first and gives a plain tensor.

    Decoded masks are copies: writing to them doesn't change the encodings. These lie in host
    memory; `device` says where masks are decoded to, except that `numpy()` and `np.asarray` work
    from any device.

    Args:
        rles: R COCO RLEs, {"size": [H, W], "counts": str or bytes}; they stay the attribute `rles`.
        image_size: (H, W); may be left out if there is a mask to tell it.
        device: that of the detections.

    Raises:
        ValueError: if an RLE's size isn't `image_size`.
        RuntimeError: later, by whatever writes to the masks or asks for their memory.
    """

    rles: list[dict[str, Any]]
    image_size: tuple[int, int]

    # All operators arrive in __torch_dispatch__, those that are called from C++ as well, and what
    # they return stays what it is.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        rles: Sequence[dict[str, Any]],
        image_size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "RLEMasks":
        height, width = image_size or (rles[0]["size"] if rles else (0, 0))
        size = (int(height), int(width))
        for rle in rles:
            if tuple(rle["size"]) != size:
                raise ValueError(f"an RLE's size is {tuple(rle['size'])}, must be {size}")
        masks = Tensor._make_wrapper_subclass(
            cls, (len(rles), *size), dtype=torch.bool, device=torch.device(device)
        )
        masks.rles, masks.image_size = list(rles), size
        return masks

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(written, RLEMasks) for written in _written(func, args, kwargs)):
            raise RuntimeError(
                f"RLE masks don't take {func}, which writes to them: {_BITMAP_INSTEAD}"
            )
        answer = NotImplemented
        if func in _FROM_RLES:
            answer = _FROM_RLES[func](*args, **kwargs)
        if answer is NotImplemented:
            answer = func(*_plain(args), **_plain(kwargs))
        return answer

    @property
    def tensor(self) -> Tensor:
        """All masks decoded: a plain bool tensor (R, H, W) on `device`."""
        return torch.from_numpy(self.numpy()).to(self.device)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """All masks decoded: bool (R, H, W)."""
        bitmaps = np.empty(self.shape, dtype=bool)
        for bitmap, rle in zip(bitmaps, self.rles):
            bitmap[:] = self._decode(rle)
        return bitmaps

    def tolist(self) -> list[Any]:
        return self.tensor.tolist()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.tensor.__dlpack__(**kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RLEMasks(shape={tuple(self.shape)}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return RLEMasks, (self.rles, self.image_size, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RLEMasks":
        return self._with(copy.deepcopy(self.rles, memo))

    # Not a TypeError, after which Python takes `masks |= x` for `masks = masks | x`.
    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError(f"RLE masks can't be written to and have no memory: {_BITMAP_INSTEAD}")

    # What doesn't arrive in __torch_dispatch__.
    __setitem__ = apply_ = map_ = map2_ = _refuse  # type: ignore[assignment]
    data_ptr = untyped_storage = _refuse
    data = property(Tensor.detach, _refuse)

    def _with(self, rles: list[dict[str, Any]], device: torch.device | None = None) -> "RLEMasks":
        return RLEMasks(rles, self.image_size, device or self.device)

    def _bitmap(self, rle: dict[str, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._decode(rle))).to(self.device)

    @staticmethod
    def _decode(rle: dict[str, Any]) -> np.ndarray:
        return coco_mask.decode(rle).view(bool)  # column by column, as RLE runs


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes to."""
    for i, parameter in enumerate(func._schema.arguments):
        if parameter.is_write:
            value = args[i] if i < len(args) else kwargs.get(parameter.name)
            yield from value if isinstance(value, (list, tuple)) else [value]


def _plain(value: Any) -> Any:
    """An operator's arguments with plain tensors in place of `RLEMasks`."""
    if isinstance(value, RLEMasks):
        return value.tensor
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


# Operators that need no bitmaps. The parameters are those of torch's operator; NotImplemented
# where it takes the bitmaps after all.


def _copy(masks: RLEMasks, **_: Any) -> RLEMasks:
    return masks._with(masks.rles)


def _to(masks: RLEMasks, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return masks._with(masks.rles, device) if dtype in (None, torch.bool) else NotImplemented


def _select(masks: RLEMasks, dim: int, index: int) -> Any:
    return masks._bitmap(masks.rles[index]) if dim == 0 else NotImplemented


def _slice(masks: RLEMasks, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return masks._with(masks.rles[start:end:step]) if dim == 0 else NotImplemented


def _index(masks: Any, indices: list[Any]) -> Any:
    if not isinstance(masks, RLEMasks) or len(indices) != 1 or indices[0].dim() != 1:
        return NotImplemented
    # torch itself chooses, so that its rules and errors hold.
    chosen = torch.arange(len(masks))[indices[0].cpu()]
    return masks._with([masks.rles[i] for i in chosen.tolist()])


def _cat(parts: list[Any], dim: int = 0) -> Any:
    first = parts[0]
    for part in parts:
        alike = part.shape[1:] == first.shape[1:] and part.device == first.device
        if not isinstance(part, RLEMasks) or not alike or dim != 0:
            return NotImplemented
    return first._with([rle for part in parts for rle in part.rles])


def _sum(masks: RLEMasks, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not _over_image(dim):
        return NotImplemented
    return _areas(masks).sum(dim, keepdim, dtype=dtype)


def _any(masks: RLEMasks, dim: Any = None, keepdim: bool = False) -> Any:
    dim = [dim] if isinstance(dim, int) else dim
    if _over_image(dim):
        return (_areas(masks) > 0).any(dim, keepdim)
    if dim not in ([0], [-3]) or len(masks) == 0:
        return NotImplemented
    return masks._bitmap(coco_mask.merge(masks.rles))[None].any(dim, keepdim)


def _over_image(dim: list[int] | None) -> bool:
    return dim is None or {1, 2} <= {d % 3 for d in dim}


def _areas(masks: RLEMasks) -> Tensor:
    """int64 (R, 1, 1), so that what is over the image may be summed over the ones."""
    # pycocotools counts the masks of a call in a uint8, which NumPy 2 refuses from 256 on.
    areas = [int(coco_mask.area(rle)) for rle in masks.rles]
    return torch.tensor(areas, dtype=torch.int64, device=masks.device).view(-1, 1, 1)


_aten = torch.ops.aten
_FROM_RLES: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _copy,
    _aten.detach.default: _copy,
    _aten.clone.default: _copy,
    _aten._to_copy.default: _to,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.index.Tensor: _index,
    _aten.cat.default: _cat,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.any.default: _any,
    _aten.any.dim: _any,
    _aten.any.dims: _any,
}

# So that torch.load takes saved masks by default: decoding them is all that their class does.
torch.serialization.add_safe_globals([RLEMasks])
