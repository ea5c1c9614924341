"""Pickles that hold arrays and plain containers, read without running what they ask for.

`pickle.load` calls any function that a file names. The model zoos' .pkl files (detectron2's,
Detectron's, Caffe2's and MSRA's) need no more than NumPy's arrays, which are built here from their
bytes alone, never by NumPy's own constructors: these believe what a pickle says of memory.
"""

import collections
import pickle
from typing import IO, Any

import numpy as np


def load(file: IO[bytes]) -> Any:
    """Read a pickle of any protocol, from Python 2 or 3, whose strings become `str` as Latin-1.

    Returns:
        Plain containers and values, and arrays and scalars of booleans, numbers or fixed-length
        strings.

    Raises:
        pickle.UnpicklingError: if it names anything else; the message says what.
        Exception: whatever a damaged pickle comes up with.
    """
    return _Unpickler(file, encoding="latin1").load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            # NumPy 2 moved `core` to `_core`.
            return _ADMITTED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is neither an array nor a plain container"
            ) from None


class _DType:
    """Stands for `numpy.dtype`: `("f4", False, True)`, then the byte order in a state."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"it has an array of dtype {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, fortran, data))


def _reconstruct(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, 0)


def _from_buffer(data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.copy()  # bytes cannot be written to, weights must


def _scalar(dtype: _DType, data: bytes | str) -> np.generic:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype.dtype)[0]


def _encode(text: str, _: str) -> bytes:
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,  # protocol 5
    ("numpy", "ndarray"): None,  # only an argument of _reconstruct
    ("numpy", "dtype"): _DType,
    ("collections", "OrderedDict"): collections.OrderedDict,
    # Protocols 0 to 2 have no bytes: they are text to encode, or none. Nor have they sets.
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): bytes,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}
