"""Python's garbage collector, which a dataset of millions of lists keeps busy for nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """A block that makes many objects, such as dicts of annotations, and no cycles.

    The search for cycles walks through all of them again and again: without it a large JSON file
    is read in half the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
