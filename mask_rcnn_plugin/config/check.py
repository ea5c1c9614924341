"""What a config may say: which keys there are, their types and their ranges.

Nothing of it is written down twice. The keys and types of plain nodes (`train`, `dataset`) are
those of the plugin's own configs, those of a node with a `_target_` are the arguments and type
hints of what it calls; only the ranges have a table, `_RANGES`.
"""

import difflib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from detectron2.layers import get_norm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mask_rcnn_plugin.config.call_signature import fits, is_call, signature_of
from mask_rcnn_plugin.config.consistency import check_consistency
from mask_rcnn_plugin.errors import ConfigError

# The top of a config. What others refer to comes first, so that it is named, not they.
NODES = ("train", "dataset", "model", "optimizer", "lr_multiplier", "dataloader")
# Calls that lack an argument until the training starts.
_GIVEN_LATER = {"optimizer.params.model"}
# Keys that a config may be without.
_OPTIONAL = {"dataset.synthetic"}
# Numbers of the plugin's own configs that may be null as well.
NULLABLE = {"train.checkpointer.max_to_keep"}

_Range = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Range = ("more than 0", lambda x: 0 < x < math.inf)
_COUNT: _Range = ("an integer of 1 or more", lambda x: isinstance(x, int) and x >= 1)
_COUNT_OR_0: _Range = ("an integer of 0 or more", lambda x: isinstance(x, int) and x >= 0)
_NOT_NEGATIVE: _Range = ("0 or more, and finite", lambda x: 0 <= x < math.inf)
_FRACTION: _Range = ("from 0 to 1", lambda x: 0 <= x <= 1)


def _is_norm(name: Any) -> bool:
    try:
        get_norm(name, 32)
    except (KeyError, TypeError):
        return False
    return True


_NORM: _Range = ("'' or what detectron2's get_norm knows, such as 'FrozenBN'", _is_norm)
_ANY: _Range = ("anything but nan", lambda x: x == x)

# The first pattern that a key's end matches counts; a list's numbers are looked up by the list's
# key. What `train` and `dataset` hold in the plugin's own configs is right in any case.
_RANGES: dict[str, _Range] = {
    "model.pixel_std": _POSITIVE,
    "train.eval_period": _COUNT_OR_0,
    "train.validation_period": _COUNT_OR_0,
    "train.max_skipped_steps": _COUNT_OR_0,
    "max_unreadable": _COUNT_OR_0,
    "num_workers": _COUNT_OR_0,
    # The rank is added, and NumPy takes 32 bits.
    "seed": ("an integer below 2**31", lambda x: isinstance(x, int) and x < 2**31),
    "sampling_ratio": _COUNT_OR_0,
    "freeze_at": ("an integer from 0 to 5", lambda x: x in range(6)),
    # As many as go in, in detectron2's words.
    "proposal_generator.head.conv_dims": (
        "an integer of 1 or more, or -1",
        lambda x: isinstance(x, int) and (x >= 1 or x == -1),
    ),
    "anchor_generator.sizes": _POSITIVE,
    "canonical_box_size": _POSITIVE,
    "crop_size": _POSITIVE,  # of the image, or in pixels
    "*timeout": _POSITIVE,
    "max_iter": (
        "an integer from 1 to 2**63 - 1",
        lambda x: isinstance(x, int) and 1 <= x < 2**63,
    ),
    "max_to_keep": _COUNT,
    "max_detections": _COUNT,
    "max_size": _COUNT,
    "short_edge_length": _COUNT,
    "*period": _COUNT,
    "*_steps": _COUNT,
    "*_size": _COUNT,
    "*batch_size_per_image": _COUNT,
    "*_topk*": _COUNT,
    "num_*": _COUNT,
    "*_dims": _COUNT,
    "*channels": _COUNT,
    "width": _COUNT,
    "momentum": ("from 0 to less than 1", lambda x: 0 <= x < 1),
    "lr": _NOT_NEGATIVE,
    "weight_decay*": _NOT_NEGATIVE,
    "*norm": _NORM,
    "*_beta": _NOT_NEGATIVE,
    "loss_weight": _NOT_NEGATIVE,
    "*_thresh": _FRACTION,
    "*_matcher.thresholds": _FRACTION,
    "positive_fraction": _FRACTION,
    "warmup_factor": _FRACTION,
    "*": _ANY,
}


def check_config(cfg: DictConfig, shipped: DictConfig, added: Collection[str] = ()) -> None:
    """Check a whole config without building anything of it.

    Args:
        cfg: overlays and overrides applied.
        shipped: a config of the plugin's, with every key that `train` and `dataset` may have.
        added: keys that are new on purpose.

    Raises:
        ConfigError: for an unknown or missing key or argument, a value of the wrong type or out of
            range, an interpolation to what is not there, a device that this machine has not, and
            what `check_consistency` refuses.
    """
    values, known = _resolved(cfg), _resolved(shipped)
    parts = [key.split(".") for key in added]
    added = {".".join(p[:i]) for p in parts for i in range(1, len(p) + 1)}
    for name in sorted(values.keys() - known.keys()):
        # A helper of the file, unless it should have been one of the nodes.
        if name not in added and f"${{{name}." not in str(OmegaConf.to_container(cfg)):
            raise ConfigError(
                f"{no_such_key(name, known)}. A helper of the file begins with an underscore"
            )
    for name in NODES:
        _check_ranges(values[name], name, known[name])
        _check_node(values[name], name, known[name], added)
    _check_device(values["train"]["device"])
    dtype = values["train"]["amp"]["dtype"]
    if dtype not in ("bf16", "fp16"):
        raise ConfigError(f"train.amp.dtype is {dtype!r}, must be 'bf16' or 'fp16'")
    check_consistency(values)


def no_such_key(
    key: str, siblings: Iterable[str], all_keys: Iterable[str] = (), depth: int = -1
) -> str:
    """What to say of a key that does not exist, with the nearest that does.

    Args:
        key: with dots.
        siblings: what there is in place of the part that does not exist.
        all_keys: what there is in place of the whole key.
        depth: index of the part that does not exist.
    """
    parts = key.split(".")
    prefix = ".".join(parts[:depth])
    siblings = sorted(siblings)
    # The whole key first: a slip in the first part would else only find top-level names.
    close = difflib.get_close_matches(key, list(all_keys), n=1) or [
        _join(prefix, k) for k in difflib.get_close_matches(parts[depth], siblings, n=1)
    ]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"no key {key!r}; {hint}{repr(prefix) if prefix else 'the config'} has {siblings}"


def settable(node: Any) -> set[str]:
    """What may be set below a node: its keys or indices, and the arguments of what it calls."""
    if isinstance(node, ListConfig):
        return {str(i) for i in range(len(node))}
    if not isinstance(node, DictConfig):
        return set()
    keys = {str(k) for k in node if k != "_target_"}
    signature = signature_of(node["_target_"]) if "_target_" in node else None
    return keys | signature.hints.keys() if signature else keys


def kind(value: Any) -> str | None:
    """Coarse type of a config value; None where anything may follow (None, objects)."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    if isinstance(value, Sequence) and not isinstance(value, bytes):  # tuples and OmegaConf's too
        kinds = {kind(v) for v in value}
        return f"list of {kinds.pop()}s" if kinds in ({"number"}, {"string"}) else "list"
    return "dict" if isinstance(value, (dict, DictConfig)) else None


def same_kind(value: Any, current: Any) -> bool:
    """Whether a value may take another's place, as far as their coarse types tell."""
    ours, theirs = kind(value), kind(current)
    if ours is None or theirs is None or "list" in (ours, theirs):  # a list empty or mixed
        return theirs is None or (ours or "").split()[:1] == theirs.split()[:1]
    return ours == theirs


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _check_node(value: Any, key: str, known: Any, added: set[str]) -> None:
    """
    Args:
        value: of the config at `key`, resolved.
        known: the plugin's own there; None if it has none, or below a call.
        added: keys that are new on purpose.
    """
    if value is None and key in _OPTIONAL | NULLABLE:
        return
    if is_call(value):
        _check_call(value, key)
    elif is_call(known) and isinstance(value, dict):
        raise ConfigError(f"{key} calls nothing: it needs a _target_, as L(...) in a file gives it")
    elif isinstance(known, dict) and isinstance(value, dict):
        for name in value:
            if name not in known and _join(key, name) not in added:
                raise ConfigError(no_such_key(_join(key, name), known, _keys(known, key)))
        missing = [k for k in known if k not in value and _join(key, k) not in _OPTIONAL]
        if missing:
            raise ConfigError(f"{key} lacks {missing}, which the plugin's own configs have")
    elif known is not None and not _fits_known(value, known):
        expected = "an integer" if type(known) is int else f"a {kind(known)}"
        raise ConfigError(f"{key} is {value!r}, must be {expected}, such as {known!r}")
    if isinstance(value, (dict, list, tuple)):
        within = known if isinstance(known, dict) and not is_call(value) else {}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, child in items:
            _check_node(child, _join(key, name), within.get(name), added)


def _fits_known(value: Any, known: Any) -> bool:
    if type(known) is int:
        return type(value) is int
    if value is None:
        return isinstance(known, (str, list))
    return same_kind(value, known)


def _check_call(value: dict[str, Any], key: str) -> None:
    target = value["_target_"]
    if isinstance(target, str):
        try:
            target = locate(target)
        except Exception as error:
            module, _, name = target.rpartition(".")
            close = difflib.get_close_matches(name, dir(sys.modules.get(module)), n=1)
            hint = f"; did you mean '{module}.{close[0]}'?" if close else ""
            raise ConfigError(
                f"{key}._target_ is {target!r}, which cannot be imported{hint}"
            ) from error
    if is_call(target):
        return
    if not callable(target):
        raise ConfigError(f"{key}._target_ is {target!r}, must be a class or function")
    signature = signature_of(target)
    if signature is None:
        return
    name = getattr(target, "__qualname__", repr(target))
    for argument, given in value.items():
        path = _join(key, argument)
        if argument == "_target_":
            continue
        if argument not in signature.hints:
            if signature.is_open:
                continue
            raise ConfigError(f"{no_such_key(path, signature.hints)}, the arguments of {name}")
        hint = signature.hints[argument]
        if not fits(given, hint):
            shown = re.sub(r"\b[\w.]+\.", "", str(hint))  # without modules
            shown = hint.__name__ if isinstance(hint, type) and "[" not in shown else shown
            raise ConfigError(f"{path} is {given!r}, must be of type {shown} ({name})")
    missing = [
        a for a in sorted(signature.required - value.keys()) if _join(key, a) not in _GIVEN_LATER
    ]
    if missing:
        raise ConfigError(f"{key} lacks {missing}, which {name} needs")


def _check_ranges(value: Any, key: str, known: Any) -> None:
    if isinstance(value, dict):
        for name, child in value.items():
            within = known.get(name) if isinstance(known, dict) else None
            _check_ranges(child, _join(key, name), within)
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            _check_ranges(child, _join(key, i), None)
    elif isinstance(value, (int, float, str)) and value != known:
        name = "." + ".".join(part for part in key.split(".") if not part.isdigit())
        rule = next(r for p, r in _RANGES.items() if fnmatchcase(name, f"*.{p}"))
        text, is_right = rule
        is_number = not isinstance(value, (bool, str))
        if not ((is_number or rule in (_ANY, _NORM)) and is_right(value)):
            raise ConfigError(f"{key} is {value!r}, must be {text}")


def _check_device(name: str) -> None:
    wrong = ConfigError(f"train.device is {name!r}, must be 'cpu', 'cuda' or 'cuda:N'")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise wrong from error
    if device.type not in ("cpu", "cuda"):
        raise wrong
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f"train.device is {name!r}, but this machine has {gpus} GPUs that torch can use; "
            "train.device=cpu runs without"
        )


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _keys(node: dict[str, Any], prefix: str) -> list[str]:
    """All keys below a resolved node."""
    keys = []
    for name, value in node.items():
        key = _join(prefix, name)
        keys += [key, *(_keys(value, key) if isinstance(value, dict) else ())]
    return keys
