"""LazyConfigs: the repository's by short name, from anywhere, or any other file."""

import difflib
import re
import traceback
from collections.abc import Iterable
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.config.check import NODES, SOURCE, check_config
from mask_rcnn_plugin.config.overrides import apply_override
from mask_rcnn_plugin.errors import ConfigError

_PACKAGE = Path(__file__).parent.parent
# Inside the package when installed, beside it in a clone.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())
_PARTS = ("common", "overlays")  # folders of it that hold no whole configs
_DEFAULT_OUTPUT_DIR = "output"  # of configs/common/train.py, for detectron2's own scripts

# ${linear_rate:RATE,REFERENCE,BATCH} in a config: the rate of a batch by the linear scaling rule.
# ${scaled:PIXELS,REFERENCE,SIZE}: PIXELS * SIZE / REFERENCE, rounded, at least 1.
# Before OmegaConf 2.4 a function of this name gave texts.
_register: Any = OmegaConf.register_resolver
if "replace" not in signature(_register).parameters:
    _register = OmegaConf.register_new_resolver
_register("linear_rate", lambda rate, reference, batch: rate * batch / reference, replace=True)
_register("scaled", lambda n, reference, size: max(1, round(n * size / reference)), replace=True)


def list_configs() -> list[str]:
    """Short names of the plugin's configs, e.g. "table2a_backbone/r50_fpn"."""
    files = (f.relative_to(CONFIG_DIR) for f in CONFIG_DIR.rglob("*.py"))
    return sorted(f.with_suffix("").as_posix() for f in files if f.parts[0] not in _PARTS)


def list_overlays() -> list[str]:
    """Names of the overlays, changes that apply to any config, e.g. "synthetic"."""
    return sorted(f.stem for f in (CONFIG_DIR / "overlays").glob("*.py"))


def get_config(name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a config. The result is the same on every machine.

    Args:
        name: short name, path of a LazyConfig file, or an output folder or its config.yaml; each
            may be followed by overlays: "table2a_backbone/r50_fpn+synthetic".
        overrides: "key=value" strings, applied in order after the overlays. A key that holds text
            takes the text as it is; other values are read as YAML. "+key=value" sets a key that is
            not there yet, for code of your own to read. "dataset=FOLDER" replaces the annotation
            files that the config names.

    Returns:
        The config. `source.config` is its name with the overlays, which the config.yaml of
        detectron2's own script lacks; `source.new_keys` is what a "+" has set. An empty or default
        `train.output_dir` becomes output/NAME. That of a config.yaml beside its run's log.txt
        becomes their folder, also in the paths of dataset files inside it.

    Raises:
        ConfigError: if there is no such file, overlay or key, the file cannot be run, or the config
            does not fit; see `check_config`.
    """
    parts = name.split("+")  # of which some may be an output folder's own
    whole = (n for n in range(len(parts), 1, -1) if Path("+".join(parts[:n])).exists())
    length = next(whole, 1)
    base, overlays = "+".join(parts[:length]), parts[length:]
    path = _find(base)
    cfg = _load(path)
    is_dump = path.suffix != ".py"  # whose output folder is the run's
    missing = [n for n in NODES if not isinstance(cfg.get(n), DictConfig)]
    if missing:
        hint = _YAML_HINT if is_dump else ""
        raise ConfigError(f"{path} is not a complete config: it lacks {missing}{hint}")
    if path.name == "config.yaml" and (path.parent / "log.txt").is_file():
        _move(cfg, path.parent)  # the run's own, which may have been moved
    for overlay in overlays:
        _apply_overlay(cfg, overlay)
    before = cfg.get(SOURCE) or {}
    source = "+".join([before.get("config", "" if is_dump else _short(path)), *overlays])
    if cfg.train.get("output_dir") in ("", None, *([] if is_dump else [_DEFAULT_OUTPUT_DIR])):
        cfg.train.output_dir = ""
    added = {*before.get("new_keys", ())}
    overrides = list(overrides)
    if any(_FOLDER.match(override) for override in overrides):
        for split in filter(OmegaConf.is_dict, (cfg.dataset.get("train"), cfg.dataset.get("test"))):
            split.update(json="", images="")
    for override in overrides:
        added |= {*apply_override(cfg, override)}
    cfg[SOURCE] = {"config": source, "new_keys": sorted(added)}
    try:
        check_config(cfg, added)
    except ConfigError as error:
        raise ConfigError(f"config {name}: {error}") from error
    cfg.train.output_dir = cfg.train.output_dir or f"output/{source or _short(path)}"
    return cfg


def base_name(cfg: DictConfig) -> str:
    """Name of the config that one from `get_config` is made of, overlays left out."""
    return str(cfg[SOURCE].config.split("+")[0])


_FOLDER = re.compile(r"dataset(\.folder)?=(?!null$).")

_YAML_HINT = (
    ". detectron2's YAML configs are for detectron2's own tools, see DETECTRON2_ENV_MODULE in the "
    "README; the only YAML file accepted here is the config.yaml of an output folder"
)


def _find(name: str) -> Path:
    path = Path(name)
    for file in (path, path / "config.yaml", CONFIG_DIR / f"{name}.py", CONFIG_DIR / name):
        if file.is_file():
            if file.suffix not in (".py", ".yaml", ".yml"):
                raise ConfigError(
                    f"config {name!r} must be a LazyConfig, a .py file, or the config.yaml of an "
                    "output folder"
                )
            return file
    configs = list_configs()
    close = difflib.get_close_matches(name.removesuffix(".py"), configs, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"no config {name!r}; {hint}available are {configs}")


def _move(cfg: DictConfig, folder: Path) -> None:
    """Make a folder the output folder, and point to the dataset files in it, as a split's."""
    old = cfg.train.get("output_dir")
    cfg.train.output_dir = str(folder)
    for split, key in product(("train", "test"), ("json", "images")) if old else ():
        path = OmegaConf.select(cfg, f"dataset.{split}.{key}", throw_on_resolution_failure=False)
        if not (isinstance(path, str) and Path(path).is_relative_to(old)):
            continue
        moved = folder / Path(path).relative_to(old)
        if moved != Path(path) and moved.exists():
            cfg.dataset[split][key] = str(moved)
            names = cfg.dataset[split].get("names") or []
            cfg.dataset[split].names = [str(moved) if n == path else n for n in names]


def _short(path: Path) -> str:
    path, root = path.resolve(), CONFIG_DIR.resolve()
    root = root if path.is_relative_to(root) else path.parent
    return path.relative_to(root).with_suffix("").as_posix()


def _load(path: Path) -> DictConfig:
    """Read a config; a ConfigError says where a file cannot be run."""
    try:
        cfg: Any = LazyConfig.load(str(path))
    except SyntaxError as error:  # detectron2 raises one from the one that knows the line
        detail = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        raise ConfigError(f"config {path}: {error} Line {detail.lineno}: {detail.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"{f.filename}, line {f.lineno}" for f in frames if f.name == "<module>"]
        what = " ".join(str(error).split())
        where = lines[-1] if lines and path.suffix == ".py" else str(path)
        raise ConfigError(f"config {path}: {type(error).__name__} in {where}: {what}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"config {path} has no keys{_YAML_HINT}")
    return cfg


def _apply_overlay(cfg: DictConfig, overlay: str) -> None:
    file = CONFIG_DIR / "overlays" / f"{overlay}.py"
    if not file.is_file():
        raise ConfigError(f"no overlay {overlay!r}; available are {list_overlays()}")
    change = LazyConfig.load(str(file), "overlay")
    try:
        change(cfg)
    except Exception as error:  # of a config that is not like the plugin's own, or changed already
        raise ConfigError(
            f"overlay {overlay!r} does not fit this config ({type(error).__name__}: {error})"
        ) from error
