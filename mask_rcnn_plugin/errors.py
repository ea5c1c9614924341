"""What can be wrong with what a user gives, as opposed to a mistake in the plugin."""

import sys
from pathlib import Path


class UserError(ValueError):
    """Something given cannot be used: a config, dataset, image or weights file.

    The message names the thing, the value and what would be right. The scripts print it as one line
    and end with exit code 2.
    """


class ConfigError(UserError):
    """A config, overlay or override that does not exist or does not fit; the message says which."""


def print_mistake(error: UserError | str) -> None:
    """One line on stderr, behind the program's name; with exit code 2 it ends the programs."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
