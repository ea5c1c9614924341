"""Changes to a config from the command line: key=value."""

import difflib
import re
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mask_rcnn_plugin.config.check import (
    LISTS,
    NEAR,
    alternatives,
    is_call,
    join,
    no_such_key,
    schema_hint,
    signature_of,
    walk,
)
from mask_rcnn_plugin.errors import ConfigError

# What keys are called in other frameworks and in detectron2's YAML. A name that is a key's own last
# part, such as num_classes, is found without.
_OTHER_NAMES = {
    "base_lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "batch_size": "dataloader.train.total_batch_size",
    "ims_per_batch": "dataloader.train.total_batch_size",
    **dict.fromkeys(("epochs", "max_epochs"), "train.epochs"),
    **dict.fromkeys(("iters", "iterations"), "train.max_iter"),
    "steps": "lr_multiplier.scheduler.milestones",
    "gamma": "lr_multiplier.scheduler.values",
    "warmup_iters": "lr_multiplier.warmup_length.iterations",
    "weights": "train.init_checkpoint",
    **dict.fromkeys(("amp", "fp16", "bf16", "mixed_precision"), "train.amp.enabled"),
    "checkpoint_period": "train.checkpointer.period",
    "min_size_train": "dataloader.train.mapper.augmentations.0.short_edge_length",
    "max_size_train": "dataloader.train.mapper.augmentations.0.max_size",
    "min_size_test": "dataloader.test.mapper.augmentations.0.short_edge_length",
    "max_size_test": "dataloader.test.mapper.augmentations.0.max_size",
    "nms_thresh_test": "model.roi_heads.box_predictor.test_nms_thresh",
    "score_thresh_test": "model.roi_heads.box_predictor.test_score_thresh",
    "detections_per_image": "dataset.test.max_detections",
    "workers": "dataloader.train.num_workers",
}


def apply_override(cfg: DictConfig, override: str) -> list[str]:
    """Apply one "key=value" in place.

    A key must exist already or, under a node that calls a class or function, be one of its
    arguments; a number is an index: dataloader.test.mapper.augmentations.0.max_size=1000.
    dataset=FOLDER is dataset.folder=FOLDER.

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
    key = "dataset.folder" if key == "dataset" else key
    parts = key.split(".")
    if not is_new:
        _check_exists(cfg, parts)
    node = cfg
    for part in parts[:-1]:
        node = _get(node, part)
    current, hint = _get(node, parts[-1]), _hint(node, key)
    kinds = _kinds(current, hint)
    is_text = str in kinds and not any(kind in kinds for kind in (bool, int, float, dict))
    if is_text and not (list in kinds and text.startswith("[")):
        value: Any = text
    else:
        value = _from_yaml(text, override, yaml.BaseLoader if is_text else _Loader)
    if "${" in text:
        raise ConfigError(
            f"override {override!r}: {text!r} refers to another key, which only a config file can "
            "do: give a value"
        )
    if value == "null" and type(None) in alternatives(hint):
        value = None
    if int in kinds:
        value = _with_integers(value)
    try:
        if OmegaConf.is_config(node) and not isinstance(node, DictConfig):
            # Whole, as OmegaConf 2.4 keeps tuples, in which nothing can be set.
            elements = list(node)
            elements[int(parts[-1])] = value
            OmegaConf.update(cfg, ".".join(parts[:-1]), elements, merge=False)
        else:
            OmegaConf.update(cfg, key, value, merge=True)
    except (OmegaConfBaseException, IndexError, ValueError) as error:
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
    """The key that is meant by one that does not exist: of its last part's name, or of one near."""
    key, name = ".".join(parts).lower(), parts[-1].lower()
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    names = {k: k.rpartition(".")[2] for k in _all_keys(cfg) if not key.startswith(f"{k}.")}
    near = difflib.get_close_matches(name, sorted({*names.values()}), n=1, cutoff=NEAR)
    same = [k for k in names if [names[k]] == near and not name.isdigit()]

    def distance(candidate: str) -> tuple[int, bool, int]:
        blocks = difflib.SequenceMatcher(None, key, candidate).get_matching_blocks()
        return -sum(block.size for block in blocks), "test" in candidate, len(candidate)

    return min(same, key=distance, default=None)


def _settable(node: Any) -> set[str]:
    """What may be set below a node: its keys or indices, and the arguments of what it calls."""
    if not OmegaConf.is_config(node):
        return set()
    if not isinstance(node, DictConfig):
        return {str(i) for i in range(len(node))}
    keys = {str(k) for k in node if k != "_target_"}
    signature = signature_of(node["_target_"]) if is_call(node) else None
    return keys | signature.hints.keys() if signature else keys


def _get(node: Any, key: str) -> Any:
    """A key's value; None for an argument that is not set and a broken interpolation."""
    try:
        if isinstance(node, DictConfig):
            return node.get(key)
        return node[int(key)] if OmegaConf.is_config(node) else None
    except (OmegaConfBaseException, ValueError, IndexError):
        return None


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    """What may be set, but for what follows another key."""
    keys = []
    for key in sorted(_settable(node)):
        path = join(prefix, key)
        if isinstance(node, DictConfig) and OmegaConf.is_interpolation(node, key):
            continue
        keys += [path, *_all_keys(_get(node, key), path)]
    return keys


def _hint(node: Any, key: str) -> Any:
    """Type hint of a key; None where there is none."""
    signature = signature_of(node["_target_"]) if is_call(node) else None
    return signature.hints.get(key.rpartition(".")[2]) if signature else schema_hint(key)


def _with_integers(value: Any) -> Any:
    """Floats that equal integers become these."""
    if isinstance(value, list):
        return [_with_integers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kinds(current: Any, hint: Any) -> list[Any]:
    """Types of what a key holds, by its hint and its value; of a list, `list` and the elements'."""
    if isinstance(current, DictConfig):
        return _hinted(hint)
    plain = current
    if OmegaConf.is_config(current):
        try:
            plain = OmegaConf.to_container(current, resolve=True)
        except OmegaConfBaseException:  # a broken interpolation
            plain = OmegaConf.to_container(current)
    return [*_hinted(hint), *(type(value) for _, value in walk(plain, ""))]


def _hinted(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return [type(a) for a in get_args(hint)]
    if get_origin(hint) in LISTS:
        return [list, *(kind for a in get_args(hint) for kind in _hinted(a))]
    if len(alternatives(hint)) > 1:
        return [kind for a in alternatives(hint) for kind in _hinted(a)]
    return [hint]


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: 010 is ten, 1e3 is a number, 1:30 and dates are texts.

    A key that stands twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.YAMLError(f"{twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    try:
        return int(node.value)
    except ValueError:
        return loader.construct_yaml_float(node)


_NUMBER = "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, r) for tag, r in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _NUMBER,
    re.compile(
        r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?$|[-+]?\.(inf|nan)$", re.IGNORECASE
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor(_NUMBER, _number)


def _from_yaml(text: str, override: str, loader: type[yaml.BaseLoader] = _Loader) -> Any:
    """The value of a text; the text itself if YAML would drop a part of it, such as a comment."""
    try:
        value = yaml.load(text, loader)
        tokens = list(yaml.scan(text))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"override {override!r}: {text!r} cannot be read as YAML ({reason}); in a list, quote "
            "text that contains '#', ':', quotes or brackets: [\"a #1\"]"
        ) from error
    end = max(
        (t.end_mark.index for t in tokens if t.end_mark.index > t.start_mark.index), default=0
    )
    named = any(isinstance(t, (yaml.AnchorToken, yaml.TagToken)) for t in tokens)
    return text if named or end < len(text.rstrip()) else value
