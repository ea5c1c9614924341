"""A config as plain values: on the screen (`--print-config`, `--diff`), and to compare runs by."""

import argparse
import os
import re
import sys
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.config.check import SOURCE, walk
from mask_rcnn_plugin.config.loading import get_config


def plain(cfg: DictConfig, *, resolve: bool = False) -> Any:
    """A config as dicts and lists of values plain enough for YAML and JSON.

    A class or function becomes its full name.
    """

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            if isinstance(node.get("_target_"), str):  # which may be one of several names
                node = {**node, "_target_": locate(node["_target_"])}
            return {str(k): visit(v) for k, v in node.items()}
        if isinstance(node, (list, tuple)):
            return [visit(v) for v in node]
        if hasattr(node, "__qualname__"):
            return f"{node.__module__}.{node.__qualname__}"
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        return re.sub(" at 0x[0-9a-f]+", "", repr(node))

    return visit(OmegaConf.to_container(cfg, resolve=resolve))


def flatten(cfg: DictConfig, *, resolve: bool = False) -> dict[str, Any]:
    """A config as {"train.max_iter": 160000, ...}, its values as `plain` has them."""
    nodes = walk(plain(cfg, resolve=resolve), "")
    return {key: node for key, node in nodes if not isinstance(node, (dict, list)) or not node}


# No trained weight depends on these, so they may change between the runs of one training.
_FREE = (
    *(SOURCE, "train.output_dir", "train.device", "train.channels_last", "train.checkpointer"),
    *("train.best_metric", "train.cudnn_benchmark", "train.process_group_timeout"),
    *("train.eval_period", "train.log_period", "train.loggers"),
    *("dataloader.train.num_workers", "dataloader.test.num_workers", "dataset.metadata"),
    *("optimizer.fused", "train.ddp.gradient_as_bucket_view", "train.compile_backbone"),
)

# Nor on these and what is beside them in their node while they are off. So a training goes on that
# began before there were these keys.
_OFF = {
    "train.epochs": ("train.epochs", None),
    "train.ema": ("train.ema.enabled", False),
    "train.early_stopping": ("train.early_stopping.metric", None),
    "dataloader.train.mapper.resize": ("dataloader.train.mapper.resize", "pillow"),
    "dataloader.test.mapper.resize": ("dataloader.test.mapper.resize", "pillow"),
    "dataset.folder": ("dataset.folder", None),
    "dataset.split": ("dataset.split", None),
}


def deciding(cfg: DictConfig) -> dict[str, Any]:
    """What of a config decides how a training goes and is tested, as `flatten` has it."""
    keys = flatten(cfg)
    free = {*_FREE, *(node for node, (key, off) in _OFF.items() if keys.get(key, off) == off)}
    return {
        key: value
        for key, value in keys.items()
        if not any(f"{key}.".startswith(f"{node}.") for node in free)
    }


def print_config(args: argparse.Namespace) -> bool:
    """Do what `--print-config` and `--diff` ask for, and return whether they ask for anything.

    Args:
        args: `print_config`, `diff`, and `config` and `overrides`, as `get_config` takes them.

    Raises:
        ConfigError: see `get_config`.
    """
    if args.diff is not None:
        text = "".join(f"{line}\n" for line in differences(args.diff, args.config, args.overrides))
    elif args.print_config:
        content = plain(get_config(args.config, args.overrides), resolve=True)
        text = (
            f"# {' '.join([args.config, *args.overrides])}: as loaded, interpolations resolved. "
            "What\n# follows from the datasets, such as num_classes, is set when a run starts.\n"
            + OmegaConf.to_yaml(OmegaConf.create(content))
        )
    else:
        return False
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # | head; Python would complain again when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def differences(base: str, name: str, overrides: list[str]) -> list[str]:
    """Lines "key: value in the config BASE -> in config NAME", for keys in which they differ.

    Raises:
        ConfigError: see `get_config`.
    """
    theirs, ours = (
        {key: repr(value) for key, value in flatten(cfg, resolve=True).items()}
        for cfg in (get_config(base), get_config(name, overrides))
    )
    return [
        f"{key}: {theirs.get(key, '(not set)')} -> {ours.get(key, '(not set)')}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not key.startswith(f"{SOURCE}.")
    ]
