"""Changes to a config from the command line: key=value."""

import difflib
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mask_rcnn_plugin.config.check import (
    alternatives,
    is_call,
    join,
    no_such_key,
    schema_hint,
    signature_of,
)
from mask_rcnn_plugin.errors import ConfigError

# What keys are called in other frameworks and in detectron2's YAML. A name that is a key's own last
# part, such as num_classes, is found without.
_OTHER_NAMES = {
    "base_lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "batch_size": "dataloader.train.total_batch_size",
    "ims_per_batch": "dataloader.train.total_batch_size",
    "epochs": "train.max_iter",
    "iterations": "train.max_iter",
    "steps": "lr_multiplier.scheduler.milestones",
    "weights": "train.init_checkpoint",
    "amp": "train.amp.enabled",
    "checkpoint_period": "train.checkpointer.period",
    "score_thresh_test": "model.roi_heads.box_predictor.test_score_thresh",
    "detections_per_image": "dataset.test.max_detections",
    "workers": "dataloader.train.num_workers",
}


def apply_override(cfg: DictConfig, override: str) -> list[str]:
    """Apply one "key=value" in place.

    A key must exist already or, under a node that calls a class or function, be one of its
    arguments; a number is an index: dataloader.test.mapper.augmentations.0.max_size=1000.

    Returns:
        The key of a "+key=value" and those above it; else [].

    Raises:
        ConfigError: for a key that does not exist, and a value that is not YAML where no text is
            expected. Types are left to `check_config`.
    """
    key, equals, text = override.partition("=")
    is_new, key = key.startswith("+"), key.removeprefix("+")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as train.device=cpu"
        )
    parts = key.split(".")
    if not is_new:
        _check_exists(cfg, parts)
    node = cfg
    for part in parts[:-1]:
        node = _get(node, part)
    current, hint = _get(node, parts[-1]), _hint(node, key)
    value = text if _is_text(current, hint) else _from_yaml(text, override)
    if "${" in text:
        raise ConfigError(
            f"override {override!r}: {text!r} refers to another key, as only a file can: give its "
            "value"
        )
    if value == "null" and type(None) in alternatives(hint):
        value = None
    is_integer = type(current) is int or int in alternatives(hint)
    if is_integer and isinstance(value, float) and value.is_integer():  # 1e3
        value = int(value)
    try:
        OmegaConf.update(cfg, key, value, merge=True)
    except (OmegaConfBaseException, IndexError) as error:
        raise ConfigError(f"override {override!r}: {str(error).splitlines()[0]}") from error
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)] if is_new else []


def _check_exists(cfg: DictConfig, parts: list[str]) -> None:
    node: Any = cfg
    for i, part in enumerate(parts):
        siblings = _settable(node)
        if part not in siblings:
            wrong = ".".join(parts[: i + 1])
            raise ConfigError(no_such_key(wrong, siblings, _meant(cfg, parts)))
        node = _get(node, part)


def _meant(cfg: DictConfig, parts: list[str]) -> str | None:
    """The key that is meant by one that does not exist."""
    key, name = ".".join(parts), parts[-1].lower()
    keys = _all_keys(cfg)
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    close = difflib.get_close_matches(key, keys, n=1)
    if close:
        return close[0]
    same = [k for k in keys if k.rpartition(".")[2] == name]
    return min(same, key=len) if same else None


def _settable(node: Any) -> set[str]:
    """What may be set below a node: its keys or indices, and the arguments of what it calls."""
    if isinstance(node, ListConfig):
        return {str(i) for i in range(len(node))}
    if not isinstance(node, DictConfig):
        return set()
    keys = {str(k) for k in node if k != "_target_"}
    signature = signature_of(node["_target_"]) if is_call(node) else None
    return keys | signature.hints.keys() if signature else keys


def _get(node: Any, key: str) -> Any:
    """A key's value; None for an argument that is not set and a broken interpolation."""
    try:
        if isinstance(node, ListConfig):
            return node[int(key)]
        return node.get(key) if isinstance(node, DictConfig) else None
    except (OmegaConfBaseException, ValueError, IndexError):
        return None


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in sorted(_settable(node)):
        path = join(prefix, key)
        keys += [path, *_all_keys(_get(node, key), path)]
    return keys


def _hint(node: Any, key: str) -> Any:
    """Type hint of a key; None where there is none."""
    signature = signature_of(node["_target_"]) if is_call(node) else None
    return signature.hints.get(key.rpartition(".")[2]) if signature else schema_hint(key)


def _is_text(current: Any, hint: Any) -> bool:
    is_choice = get_origin(hint) is Literal
    kinds = list(map(type, get_args(hint))) if is_choice else alternatives(hint)
    if any(kind in kinds for kind in (bool, int, float)):
        return False
    return isinstance(current, str) or str in kinds


def _from_yaml(text: str, override: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except Exception as error:
        raise ConfigError(f"override {override!r}: {text!r} cannot be read as YAML") from error
