import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask_rcnn_plugin.weights import safe_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(24, dtype=">i8").reshape(2, 3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(10, dtype=np.float16)[::2],
    np.array(7, dtype=np.int64),
    np.zeros((0, 3), np.float32),
    np.array([True, False]),
    np.array(["a", "bcd"]),
    np.array([b"a", b"bcd"]),
]


def load(content: bytes) -> Any:
    return safe_pickle.load(io.BytesIO(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_are_what_they_were(protocol: int, array: np.ndarray) -> None:
    loaded = load(pickle.dumps(array, protocol))
    # Up to the order of bytes, which NumPy may make the machine's own.
    assert loaded.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert loaded.shape == array.shape
    np.testing.assert_array_equal(loaded, array)
    assert loaded.flags.writeable


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_are_what_they_were(protocol: int) -> None:
    content = OrderedDict(
        blobs={"conv1_w": [1, 2.5, None, True], "é": ("x", b"\x00\xff", b"", {3})},
        scalar=[np.float32(1.5), np.int64(2**40), np.str_("ab")],
    )
    loaded = load(pickle.dumps(content, protocol))
    assert loaded == content
    assert list(map(type, loaded["scalar"])) == [np.float32, np.int64, np.str_]


def test_python_2s_arrays_as_in_the_msra_backbones() -> None:
    # cPickle.dumps({"a": numpy.array([1, 2], "<f4")}, 2) of Python 2: data is a byte string
    content = (
        b"\x80\x02}q\x01U\x01acnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
        b"K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        b"\x00\x00\x80?\x00\x00\x00@tbs."
    )
    np.testing.assert_array_equal(load(content)["a"], np.float32([1, 2]))


class Runs:
    """Pickled, a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_runs_code_is_refused_and_named(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = {"model": {"a": np.zeros(2), "b": Runs(os.mkdir, str(marker))}}
    with pytest.raises(pickle.UnpicklingError, match=r"asks for posix\.mkdir"):
        load(pickle.dumps(content, protocol))
    assert not marker.exists()
    pickle.loads(pickle.dumps(content, protocol))
    assert marker.exists()  # the file does run code


@pytest.mark.parametrize(
    "attack",
    [
        Runs(eval, "1"),
        Runs(getattr, 1, "real"),
        Runs(np.load, "x", None, True),
        Runs(np.memmap, "x"),
        np.array([Runs(eval, "1")], dtype=object),
    ],
    ids=["eval", "getattr", "np.load", "np.memmap", "object array"],
)
def test_other_functions_are_refused(attack: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it asks for|it has an array of dtype object"):
        load(pickle.dumps(attack, 4))


@pytest.mark.parametrize("name", [b"os.system", b"ndarray.__class__", b"dtype.__init__"])
def test_a_dotted_name_reaches_nothing(name: bytes) -> None:
    module = b"numpy"
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(n)]) + n for n in (module, name))
    with pytest.raises(pickle.UnpicklingError, match="it asks for numpy."):
        load(content + b"\x93.")


def test_an_object_array_cannot_be_made_from_bytes() -> None:
    # NumPy's own dtype would take the flag away that says that its items are references.
    class Fake:
        def __reduce__(self) -> Any:
            return np.dtype, ("f8", False, True), (3, "|", None, (), {}, 8, 8, 63)

    class Array:
        def __reduce__(self) -> Any:
            state = (1, (1,), Fake(), False, b"\x01" * 8)
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    loaded = load(pickle.dumps(Array(), 4))
    assert loaded.dtype == np.float64
    assert not loaded.dtype.hasobject
