"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

SUFFIX = ".tmp"


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Replace a file by what is written in the block, once that is on the disk.

    The block writes PATH.tmp in the same folder; an exception removes it. If the process or the
    machine dies, at any moment, PATH is either the old file or the new one.

    Args:
        path: need not exist, its folder must.

    Raises:
        OSError: as a write does, e.g. where there is no room; the old file is left.
    """
    temporary = path.with_name(path.name + SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too, which is the folder's
        finally:
            os.close(folder)
