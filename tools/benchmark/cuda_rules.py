"""Tensors of the CPU under CUDA's rules, for tests on machines without a GPU.

    with CudaRules() as cuda:
        model.to("cuda")
        with cuda.counted() as cost:
            model(batch)
    cost.waits       # {"roi_heads.py:210 label_and_sample_proposals": 2, ...}

Inside, tensors made by `.to("cuda")` or `device="cuda"`, and what is computed from them, are "on
CUDA": they say so (`device`, `is_cuda`), do not mix with host tensors, and have no NumPy array.
They are in CPU memory, and CPU kernels compute them. Every place where real CUDA would make the
host wait, copy to the device, or launch an operator is counted, with detectron2's or our line.

A mark on the storage says what is on CUDA, so views, detached and saved tensors are too. A
TorchFunctionMode sees the Python functions (`.device` and the `device=` arguments appear only
there), a TorchDispatchMode the operators that they and the gradients call.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mask_rcnn_plugin.modeling import RLEMasks

CUDA = torch.device("cuda", 0)
_OURS = ("mask_rcnn_plugin", "detectron2", "torchvision", "fvcore")

aten = torch.ops.aten
# Kernels whose output's size is the values' (they wait for it), and reads of a value.
_WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,  # of its largest value
    aten.segment_reduce.default,
}
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "set_",
    "resize_",
}


class CudaError(RuntimeError):
    """What CUDA refuses."""


@dataclass
class Cost:
    """What was counted: how often, by the line that did it.

    waits: the host waits for the device, to read a value or the size of a result.
    copies: from the host's memory to the device's.
    operators: dispatched on the device, views and allocations aside.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def totals(self) -> tuple[int, int, int]:
        return self.waits.total(), self.copies.total(), self.operators.total()

    def lines(self, most: int = 40) -> str:
        """Where the waits, copies and most operators are."""
        text = []
        for name in ("waits", "copies", "operators"):
            counts: Counter[str] = getattr(self, name)
            text.append(f"{name}: {counts.total()}")
            text += [f"  {n:5d}  {line}" for line, n in counts.most_common(most)]
        return "\n".join(text)


def on_cuda(x: Any) -> bool:
    """Whether a tensor is on the pretended device."""
    if not isinstance(x, Tensor) or isinstance(x, RLEMasks):  # of the host, whatever they say
        return False
    return getattr(_storage(x), "on_cuda", False)


def _storage(x: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()


def _mark(x: Any) -> Any:
    for tensor in tree_leaves(x):
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            _storage(tensor).on_cuda = True
    return x


class CudaRules(contextlib.ExitStack):
    """See the module."""

    def __enter__(self) -> "CudaRules":
        super().__enter__()
        self.cost = Cost()
        self.moving = self.inside = 0
        # It asks the machine, not a tensor.
        autocast = torch.autocast

        def on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return autocast("cpu", *args, **kwargs)

        self.enter_context(mock.patch.object(torch, "autocast", on_cpu))
        self.enter_context(_Operators(self))
        self.enter_context(_Functions(self))
        return self

    @contextlib.contextmanager
    def counted(self) -> Iterator[Cost]:
        """What is done within."""
        before, self.cost = self.cost, Cost()
        try:
            yield self.cost
        finally:
            self.cost = before

    def wait(self) -> None:
        self.cost.waits[source_line()] += 1

    def copy(self) -> None:
        self.cost.copies[source_line()] += 1

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """What computes in here is the device's own doing."""
        self.moving += 1
        try:
            yield
        finally:
            self.moving -= 1


def source_line() -> str:
    """The innermost line of detectron2's or ours, but for this file's."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.name != Path(__file__).name and any(part in _OURS for part in path.parts):
            return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


class _Operators(TorchDispatchMode):
    """Marks what is computed on the device, refuses what mixes, counts."""

    def __init__(self, rules: CudaRules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if on_cuda(x)]
        if self.rules.moving or not (here or (self.rules.inside and not tensors)):
            return func(*args, **kwargs)
        self._check(func, tensors)
        self._count(func, args, kwargs)
        out = func(*args, **kwargs)
        return out if func is aten._local_scalar_dense.default else _mark(out)

    def _check(self, func: Any, tensors: list[Tensor]) -> None:
        others = [x for x in tensors if not on_cuda(x)]
        name = func.overloadpacket.__name__
        if name in ("index", "index_put_", "index_put", "_index_put_impl_") and all(
            not x.is_floating_point() or x.dim() == 0 for x in others
        ):
            return  # indices may be of the host: they are copied
        if name in ("copy_", "_to_copy") or all(x.dim() == 0 for x in others):
            return
        if _in_backward() and all(not x.any() for x in others):
            return _mark(others) and None  # zeros that a gradient's formula makes
        raise CudaError(
            f"{func}: expected all tensors to be on the same device, but found cuda:0 and "
            f"{[tuple(x.shape) for x in others]} on the CPU at {source_line()}"
        )

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        rules, name = self.rules, func.overloadpacket.__name__
        if (
            func in _WAITING
            or "nms" in name
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        ):
            rules.wait()
        elif name == "copy_":
            if not on_cuda(args[0]):
                rules.wait()
            elif not on_cuda(args[1]) and args[1].dim():
                rules.copy()
        elif name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            # A mask is made indices of; with one number it is a choice, cell by cell.
            fills = name != "index" and args[2].numel() == 1 and not on_cuda(args[2])
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8) and not fills:
                    rules.wait()
                if not on_cuda(index):
                    rules.copy()
        if not func.is_view and name not in _NO_KERNEL:
            rules.cost.operators["gradients" if _in_backward() else source_line()] += 1
            rules.cost.kinds[name] += 1


_Property = Callable[[Tensor], Any]
_DEVICE: _Property = Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA: _Property = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_IS_CPU: _Property = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


class _Functions(TorchFunctionMode):
    """Answers for the device, and moves to and from it."""

    def __init__(self, rules: CudaRules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func == _DEVICE:
            return CUDA if on_cuda(first) else func(*args)
        if func == _IS_CUDA:
            return on_cuda(first)
        if func == _IS_CPU:
            return not on_cuda(first)
        if func == Tensor.to:
            return self._to(*args, **kwargs)
        if func == Tensor.cuda:
            return self._to(first, CUDA)
        if func == Tensor.cpu:
            return self._to(first, "cpu")
        if func == Tensor.pin_memory:
            return first
        if func in (Tensor.numpy, Tensor.__array__) and on_cuda(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func == Tensor.tolist and on_cuda(first):
            self.rules.wait()
            with self.rules.unseen():
                return func(*args)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is None:
            if func == Tensor.new_tensor and on_cuda(first):
                self.rules.copy()
                with self.rules.unseen():
                    return _mark(func(*args, **kwargs))
            # Tensors that it makes on the way are where its arguments are.
            inside = any(on_cuda(x) for x in tree_leaves((args, kwargs)))
            self.rules.inside += inside
            try:
                return func(*args, **kwargs)
            finally:
                self.rules.inside -= inside
        kwargs["device"] = "cpu"
        if torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if func in _FROM_DATA and not on_cuda(first):
            self.rules.copy()
        with self.rules.unseen():
            out = func(*args, **kwargs)
        if func in _FROM_DATA and not on_cuda(first):
            out = out.clone() if isinstance(first, Tensor) or hasattr(first, "__array__") else out
        elif getattr(func, "__name__", "") not in _NO_KERNEL and func not in _FROM_DATA:
            self.rules.cost.operators[source_line()] += 1
            self.rules.cost.kinds[func.__name__] += 1
        return _mark(out)

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in its three forms: of a device, a dtype, another tensor."""
        given = list(args)
        if given and isinstance(given[0], Tensor):
            kwargs["device"] = CUDA if on_cuda(given[0]) else "cpu"
            given[0] = given[0].dtype
        elif given and not isinstance(given[0], torch.dtype):
            kwargs["device"] = given.pop(0)
        kwargs.update(zip(("dtype", "non_blocking", "copy"), given))
        device = kwargs.pop("device", None)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        there = on_cuda(x) if device is None else torch.device(device).type == "cuda"
        if there == on_cuda(x):
            return Tensor.to(x, **{"dtype": x.dtype, **kwargs})
        self.rules.copy() if there else self.rules.wait()
        with self.rules.unseen():
            moved = Tensor.to(x, **{"dtype": x.dtype, **kwargs, "copy": True})
        return _mark(moved) if there else moved
