"""What only the main process decides, as each process has its own view of the file system."""

from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.utils import comm

from mask_rcnn_plugin.errors import UserError

T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process only. All processes call this.

    Returns:
        In every process, what the function has returned.

    Raises:
        UserError: in every process, if the function has raised it.
    """
    result: Any = None
    error: UserError | None = None
    if comm.is_main_process():
        try:
            result = function()
        except UserError as caught:
            error = caught
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result
