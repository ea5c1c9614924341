"""LazyConfigs: `get_config` loads one of the repository's (by short name, from anywhere) or any
other file, and applies overrides; a key that does not exist is refused."""

import copy
import difflib
import functools
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from mask_rcnn_plugin.config.check import (
    NODES,
    NULLABLE,
    check_config,
    kind,
    no_such_key,
    same_kind,
    settable,
)
from mask_rcnn_plugin.errors import ConfigError

_PACKAGE = Path(__file__).parent.parent
# Inside the package when installed, beside it in a clone.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())
# Folders of CONFIG_DIR that hold parts of configs.
_PARTS = ("common", "overlays")


def list_configs() -> list[str]:
    """Short names of the configs that come with the plugin, e.g. "table2a_backbone/r50_fpn"."""
    files = (f.relative_to(CONFIG_DIR) for f in CONFIG_DIR.rglob("*.py"))
    return sorted(f.with_suffix("").as_posix() for f in files if f.parts[0] not in _PARTS)


def list_overlays() -> list[str]:
    """Names of the overlays, changes that apply to any config, e.g. "synthetic"."""
    return sorted(f.stem for f in (CONFIG_DIR / "overlays").glob("*.py"))


def get_config(name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a config.

    Args:
        name: short name, e.g. "table2a_backbone/r50_fpn", or path of a LazyConfig file; either may
            be followed by overlays: "table2a_backbone/r50_fpn+synthetic".
        overrides: "key=value" strings, applied in order after the overlays. Values are read as
            YAML: numbers, true/false, null, [lists]; anything else is a string. "+key=value" sets
            a key that is not there yet, for code of your own to read.

    Returns:
        The config, with `model`, `dataset`, `dataloader`, `optimizer`, `lr_multiplier` and
        `train`. An empty `train.output_dir` becomes output/NAME.

    Raises:
        ConfigError: if there is no such file, overlay or key, the file cannot be run, or a value
            has the wrong type or is out of range; see `check_config`.
    """
    base, *overlays = _split(name)
    path, short = _find(base)
    cfg = _load(path)
    missing = [n for n in NODES if n not in cfg]
    if missing:
        raise ConfigError(f"{path} is no whole config: it has no {missing}")
    for overlay in overlays:
        _apply_overlay(cfg, overlay)
    added = [key for override in overrides if (key := apply_override(cfg, override))]
    if OmegaConf.is_dict(cfg.train) and not OmegaConf.select(cfg, "train.output_dir"):
        cfg.train.output_dir = f"output/{'+'.join([short, *overlays])}"
    try:
        check_config(cfg, _shipped(), added)
    except ConfigError as error:
        raise ConfigError(f"config {name}: {error}") from error
    return cfg


def apply_override(cfg: DictConfig, override: str) -> str | None:
    """Apply one "key=value" in place.

    A key must exist already or, under a node that calls a class or function, be one of its
    arguments; a number is an index: dataloader.test.mapper.augmentations.0.max_size=1000.

    Returns:
        The key of a "+key=value".

    Raises:
        ConfigError: see `get_config`.
    """
    key, equals, text = override.partition("=")
    key = key.removeprefix("+")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as train.device=cpu"
        )
    try:
        value = OmegaConf.create({"value": None})
        value.merge_with_dotlist([f"value={text}"])
        value = value["value"]
    except InterpolationResolutionError as error:
        raise ConfigError(
            f"override {override!r}: {text!r} refers to another key, as only a file can: give its "
            "value"
        ) from error
    except Exception as error:
        raise ConfigError(f"override {override!r}: {text!r} cannot be read as YAML") from error
    if override.startswith("+"):
        _update(cfg, key, value, override)
        return key

    node, parts = cfg, key.split(".")
    for i, part in enumerate(parts):
        siblings = settable(node)
        if part not in siblings:
            raise ConfigError(no_such_key(key, siblings, _all_keys(cfg), i))
        if i < len(parts) - 1:
            node = _get(node, part)
    current = _get(node, parts[-1])
    may_be_null = kind(current) not in ("bool", "number") or key in NULLABLE
    if not same_kind(value, current) and not (value is None and may_be_null):
        raise ConfigError(
            f"override {override!r}: {value!r} is a {kind(value) or type(value).__name__}, "
            f"{key} is a {kind(current)} ({current!r})"
        )
    _update(node, parts[-1], value, override)
    return None


def short_name(name: str) -> str:
    """What a config is called, overlays left out: "table2a_backbone/r50_fpn" also for its path.

    Args:
        name: as `get_config` takes it.

    Raises:
        ConfigError: if there is no such file.
    """
    return _find(_split(name)[0])[1]


def plain(cfg: DictConfig, *, resolve: bool = False) -> Any:
    """A config as dicts and lists of values plain enough for YAML and JSON.

    A class or function becomes its full name; interpolations stay as they are written unless they
    are to be resolved.
    """

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
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
    flat: dict[str, Any] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, (dict, list)) and node:
            for k, v in node.items() if isinstance(node, dict) else enumerate(node):
                visit(v, f"{key}.{k}" if key else str(k))
        else:
            flat[key] = node

    visit(plain(cfg, resolve=resolve), "")
    return flat


# No trained weight depends on these, so they may change between the runs of one training.
_FREE = (
    *(
        "train.output_dir",
        "train.device",
        "train.checkpointer",
        "train.best_metric",
        "train.cudnn_benchmark",
    ),
    *("train.eval_period", "train.log_period", "train.process_group_timeout"),
    *("dataloader.train.num_workers", "dataloader.test.num_workers"),
)


def deciding(cfg: DictConfig) -> dict[str, Any]:
    """What of a config decides how a training goes and is tested, as `flatten` has it."""
    return {
        key: value
        for key, value in flatten(cfg).items()
        if not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    }


def _split(name: str) -> list[str]:
    """A config's name or path, and its overlays."""
    return [name] if Path(name).is_file() else name.split("+")


def _find(name: str) -> tuple[Path, str]:
    """The file of a config, and what to call its output folder."""
    path = Path(name)
    if path.suffix not in ("", ".py"):
        raise ConfigError(
            f"config {name!r}: a LazyConfig is a .py file. YAML configs are for detectron2's own "
            "tools, see the README on DETECTRON2_ENV_MODULE"
        )
    for file in (path, CONFIG_DIR / f"{name}.py", CONFIG_DIR / name):
        if file.is_file():
            inside = file.resolve().is_relative_to(CONFIG_DIR.resolve())
            root = CONFIG_DIR.resolve() if inside else file.resolve().parent
            return file, file.resolve().relative_to(root).with_suffix("").as_posix()
    configs = list_configs()
    close = difflib.get_close_matches(name.removesuffix(".py"), configs, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"no config {name!r}; {hint}there is {configs}")


def _update(node: Any, key: str, value: Any, override: str) -> None:
    try:
        OmegaConf.update(node, key, value, merge=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"override {override!r}: {str(error).splitlines()[0]}") from error


def _get(node: Any, key: str) -> Any:
    """A key's value; None for an argument that is not set or an interpolation without a value."""
    try:
        return node[int(key)] if isinstance(node, ListConfig) else node.get(key)
    except OmegaConfBaseException:
        return None


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in sorted(settable(node)):
        keys.append(prefix + key)
        keys += _all_keys(_get(node, key), f"{prefix}{key}.")
    return keys


def _load(path: Path) -> DictConfig:
    """
    Raises:
        ConfigError: if the file cannot be run; the message says where.
    """
    try:
        return LazyConfig.load(str(path))
    except SyntaxError as error:  # detectron2 raises one from the one that knows the line
        detail = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        raise ConfigError(f"config {path}: {error} Line {detail.lineno}: {detail.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"{f.filename}, line {f.lineno}" for f in frames if f.name == "<module>"]
        what = " ".join(str(error).split())
        raise ConfigError(
            f"config {path}: {type(error).__name__} in {(lines or [str(path)])[-1]}: {what}"
        ) from error


def _apply_overlay(cfg: DictConfig, overlay: str) -> None:
    file = CONFIG_DIR / "overlays" / f"{overlay}.py"
    if not file.is_file():
        raise ConfigError(f"no overlay {overlay!r}; there is {list_overlays()}")
    change = LazyConfig.load(str(file), "overlay")
    try:
        change(cfg)
    except Exception as error:  # of a config that is not like the plugin's own, or changed already
        raise ConfigError(
            f"overlay {overlay!r} does not fit what it is put on ({type(error).__name__}: {error})"
        ) from error


@functools.cache
def _shipped() -> DictConfig:
    """A config with every key that `train` and `dataset` may have."""
    cfg = _load(CONFIG_DIR / "table2a_backbone" / "r50_fpn.py")
    drawn = copy.deepcopy(cfg)
    _apply_overlay(drawn, "synthetic")
    cfg.dataset.synthetic = drawn.dataset.synthetic
    return cfg
