"""Configs, in both of detectron2's languages.

LazyConfig: `get_config` loads one of the repository's configs (by short name, from anywhere) or any
other LazyConfig file, and applies overrides; a key that does not exist is refused.
YAML: `add_mask_rcnn_config` adds the keys that the plugin's heads read.
"""

import difflib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mask_rcnn_plugin.errors import UserError

_PACKAGE = Path(__file__).parent
# Inside the package when installed, beside it in a clone.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())
# Folders of CONFIG_DIR that hold parts of configs.
_PARTS = ("common", "overlays")
_NODES = ("model", "dataset", "dataloader", "optimizer", "lr_multiplier", "train")


class ConfigError(UserError):
    """A config, overlay or override that does not exist or does not fit; the message says which."""


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
            YAML: numbers, true/false, null, [lists]; anything else is a string.

    Returns:
        The config, with `model`, `dataset`, `dataloader`, `optimizer`, `lr_multiplier` and
        `train`. An empty `train.output_dir` becomes output/NAME.

    Raises:
        ConfigError: if there is no such file, overlay or key, or a value has the wrong type.
    """
    base, *overlays = _split(name)
    path, short = _find(base)
    cfg = LazyConfig.load(str(path))
    missing = [n for n in _NODES if n not in cfg]
    if missing:
        raise ConfigError(f"{path} is no whole config: it has no {missing}")
    for overlay in overlays:
        file = CONFIG_DIR / "overlays" / f"{overlay}.py"
        if not file.is_file():
            raise ConfigError(f"no overlay {overlay!r} (in {name!r}); there is {list_overlays()}")
        LazyConfig.load(str(file), "overlay")(cfg)
    for override in overrides:
        apply_override(cfg, override)
    if OmegaConf.select(cfg, "train.output_dir") == "":
        cfg.train.output_dir = f"output/{'+'.join([short, *overlays])}"
    return cfg


def apply_override(cfg: DictConfig, override: str) -> None:
    """Apply one "key=value" in place.

    A key must exist already or, under a node that calls a class or function, be one of its
    arguments; a number is an index: dataloader.test.mapper.augmentations.0.max_size=1000.

    Raises:
        ConfigError: see `get_config`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        value = OmegaConf.create({"value": None})
        value.merge_with_dotlist([f"value={text}"])
        value = value["value"]
    except Exception as error:
        raise ConfigError(f"override {override!r}: {text!r} cannot be read as YAML") from error

    node, parts = cfg, key.split(".")
    for i, part in enumerate(parts):
        keys = _keys(node)
        if part not in keys:
            prefix = ".".join(parts[:i])
            # The whole key first: a slip in the first part would else only find top-level names.
            close = difflib.get_close_matches(key, _all_keys(cfg), n=1) or [
                f"{prefix}.{k}".lstrip(".") for k in difflib.get_close_matches(part, keys, n=1)
            ]
            hint = f"did you mean {close[0]!r}? " if close else ""
            where = f"{prefix!r}" if prefix else "the config"
            raise ConfigError(f"no key {key!r}; {hint}{where} has {sorted(keys)}")
        if i < len(parts) - 1:
            node = _get(node, part)
    current = _get(node, parts[-1])
    kind = _kind(current)
    null_means_none = value is None and kind not in ("bool", "number")
    if kind is not None and _kind(value) != kind and not null_means_none:
        raise ConfigError(
            f"override {override!r}: {value!r} is a {_kind(value) or type(value).__name__}, "
            f"{key} is a {kind} ({current!r})"
        )
    OmegaConf.update(node, parts[-1], value, merge=True)


def short_name(name: str) -> str:
    """What a config is called, overlays left out: "table2a_backbone/r50_fpn" also for its path.

    Args:
        name: as `get_config` takes it.

    Raises:
        ConfigError: if there is no such file.
    """
    return _find(_split(name)[0])[1]


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """A config as {"train.max_iter": 160000, ...}, its values plain enough for JSON.

    Interpolations stay as they are written; a class or function becomes its full name.
    """
    flat: dict[str, Any] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, (dict, list, tuple)) and node:
            for k, v in node.items() if isinstance(node, dict) else enumerate(node):
                visit(v, f"{key}.{k}" if key else str(k))
        elif hasattr(node, "__qualname__"):
            flat[key] = f"{node.__module__}.{node.__qualname__}"
        elif node is None or isinstance(node, (bool, int, float, str, dict, list)):
            flat[key] = node
        else:
            flat[key] = re.sub(" at 0x[0-9a-f]+", "", repr(node))

    visit(OmegaConf.to_container(cfg, resolve=False), "")
    return flat


# No trained weight depends on these, so they may change between the runs of one training.
_FREE = (
    *("train.output_dir", "train.device", "train.checkpointer", "train.cudnn_benchmark"),
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


def add_mask_rcnn_config(cfg: CfgNode) -> None:
    """Add the plugin's keys to a detectron2 YAML config; those that are there keep their values.

    MODEL.ROI_MASK_HEAD.LOSS_TYPE: "sigmoid" or "softmax" (Table 2b).
    MODEL.ROI_MASK_HEAD.FC_DIMS: hidden widths of `MaskRCNNMLPHead` (Table 2e).
    MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT: "rle" or "bitmap", what `MaskRCNN` returns.
    MODEL.ROI_{BOX,MASK,KEYPOINT}_HEAD.POOLER_AGGREGATION: "ave" or "max" (Table 2c).

    detectron2's own MODEL.ROI_{BOX,MASK,KEYPOINT}_HEAD.POOLER_TYPE also takes "RoIPool", "RoIWarp"
    and "RoIAlign" with the plugin's RoI heads.
    """
    model = cfg.MODEL
    for node, key, value in [
        (model.ROI_MASK_HEAD, "LOSS_TYPE", "sigmoid"),
        (model.ROI_MASK_HEAD, "FC_DIMS", [1024, 1024]),
        (model.ROI_MASK_HEAD, "OUTPUT_FORMAT", "rle"),
        (model.ROI_BOX_HEAD, "POOLER_AGGREGATION", "ave"),
        (model.ROI_MASK_HEAD, "POOLER_AGGREGATION", "ave"),
        (model.ROI_KEYPOINT_HEAD, "POOLER_AGGREGATION", "ave"),
    ]:
        node.setdefault(key, value)


def require_mask_rcnn_config(cfg: CfgNode) -> None:
    """
    Raises:
        KeyError: if `add_mask_rcnn_config` was not called on a YAML config.
    """
    if "LOSS_TYPE" not in cfg.MODEL.ROI_MASK_HEAD:
        raise KeyError(
            "this config has not the plugin's keys: call mask_rcnn_plugin.add_mask_rcnn_config(cfg)"
            " after get_cfg(), or set DETECTRON2_ENV_MODULE=mask_rcnn_plugin.env"
        )


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


def _get(node: Any, key: str) -> Any:
    """A key's value; None for an argument that is not set or an interpolation without a value."""
    try:
        return node[int(key)] if isinstance(node, ListConfig) else node.get(key)
    except OmegaConfBaseException:
        return None


def _keys(node: Any) -> set[str]:
    """What may be set below a node: its keys or indices, and the arguments of what it calls."""
    if isinstance(node, ListConfig):
        return {str(i) for i in range(len(node))}
    if not isinstance(node, DictConfig):
        return set()
    keys = {str(k) for k in node if k != "_target_"}
    if "_target_" in node:
        keys |= _arguments(node["_target_"])
    return keys


def _arguments(target: Any) -> set[str]:
    """Names of a callable's keyword arguments; those of base classes too while it passes on **."""
    if not callable(target):
        return set()
    constructors = [target]
    if inspect.isclass(target):
        constructors = [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)]
    names: set[str] = set()
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in sorted(_keys(node)):
        keys.append(prefix + key)
        keys += _all_keys(_get(node, key), f"{prefix}{key}.")
    return keys


def _kind(value: Any) -> str | None:
    """Coarse type of a config value; None where anything may follow (None, objects)."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    if isinstance(value, (list, tuple, ListConfig)):
        return "list"
    return "dict" if isinstance(value, (dict, DictConfig)) else None
