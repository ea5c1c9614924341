"""A config on the screen: `--print-config` and `--diff` of the programs that train one."""

import argparse
from typing import Any

from omegaconf import OmegaConf

from mask_rcnn_plugin.config.loading import flatten, get_config, plain


def add_print_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--print-config` and `--diff BASE`."""
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the config, overlays and overrides applied, as YAML, and do nothing else",
    )
    parser.add_argument(
        "--diff",
        metavar="BASE",
        help="print what the config has otherwise than the config BASE, and do nothing else",
    )


def print_config(args: argparse.Namespace) -> bool:
    """Do what `--print-config` and `--diff` ask for.

    Args:
        args: also `config` and `overrides`, as `get_config` takes them.

    Returns:
        Whether they ask for anything.

    Raises:
        ConfigError: see `get_config`.
    """
    if args.diff is not None:
        for line in differences(args.diff, args.config, args.overrides):
            print(line)
    elif args.print_config:
        content = plain(get_config(args.config, args.overrides), resolve=True)
        print(
            f"# {' '.join([args.config, *args.overrides])}: as loaded, interpolations resolved. "
            "What a run takes\n# from its data sets, such as num_classes, it sets when it starts."
        )
        print(OmegaConf.to_yaml(OmegaConf.create(content)), end="")
    return args.diff is not None or args.print_config


def differences(base: str, name: str, overrides: list[str]) -> list[str]:
    """Lines "key: value in the config BASE -> in config NAME", for keys in which they differ.

    Raises:
        ConfigError: see `get_config`.
    """
    ours = flatten(get_config(name, overrides), resolve=True)
    theirs = flatten(get_config(base), resolve=True)

    def shown(values: dict[str, Any], key: str) -> str:
        return repr(values[key]) if key in values else "(not there)"

    return [
        f"{key}: {shown(theirs, key)} -> {shown(ours, key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if shown(theirs, key) != shown(ours, key)
    ]
