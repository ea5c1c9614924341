"""What can be wrong with what a user gives, as opposed to a mistake in the plugin."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something given cannot be used: a config, dataset, image or weights file.

    The message names the thing, the value and what would be right. The scripts print it as one line
    and end with exit code 2.
    """


class ConfigError(UserError):
    """A config, overlay or override that does not exist or does not fit; the message says which."""


def counted(count: int, one: str, more: str) -> str:
    """A number of things, for a message: "1 class", "2 classes"."""
    return f"{count} {one if count == 1 else more}"


def print_mistake(error: UserError | str) -> None:
    """Print one line on stderr, after the program's name."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A block of a program that a `UserError` ends with one line and exit code 2."""
    try:
        yield
    except UserError as error:
        print_mistake(error)
        sys.exit(2)
