"""Checks a whole config before anything in it is built, the same on every machine."""

import difflib
import functools
import inspect
import re
import sys
import types
import typing
from collections import abc
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mask_rcnn_plugin.config import schema
from mask_rcnn_plugin.config.schema import BOUNDS, COUNT, SCHEMAS
from mask_rcnn_plugin.errors import ConfigError
from mask_rcnn_plugin.modeling.mask_loss import find_masks
from mask_rcnn_plugin.modeling.roi_pooling import find_roi_layer

# The top of a config. What others refer to comes first, so that it is named, not they.
NODES = ("train", "dataset", "model", "optimizer", "lr_multiplier", "dataloader")
HELPERS = ("finetune", "lsj")  # which nodes refer to; those of overlays
SOURCE = "source"  # set by `get_config`: where the config comes from
_CALLS = (
    *("model", "optimizer", "lr_multiplier"),
    *("dataloader.train", "dataloader.test", "dataloader.evaluator"),
)
_GIVEN_LATER = "optimizer.params.model"  # an argument that is missing until the training starts

NEAR = 0.75  # how like a name must be to one that may be meant

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {  # of each task, in COCO's order
    "bbox": _AP,
    "segm": _AP,
    "keypoints": tuple(name for name in _AP if name != "APs"),
    "box_proposals": tuple(f"AR{area}@{n}" for n in (100, 1000) for area in ("", "s", "m", "l")),
}


def check_config(cfg: DictConfig, added: Collection[str] = ()) -> None:
    """
    Args:
        cfg: overlays and overrides applied.
        added: keys that are new on purpose, with those above them.

    Raises:
        ConfigError: for an unknown or missing key or argument, a value of the wrong type or out of
            bounds, an interpolation to what is not there, a task that the model has no branch for,
            a metric that no task or no evaluation gives, and two limits of detections.
    """
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        # A wrong value that others refer to, if it is one, is what to name.
        _check_nodes(OmegaConf.to_container(cfg), added)
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    for name in sorted(values.keys() - {*NODES, SOURCE, *added}):
        # A helper of the file, unless it should have been one of the nodes.
        if f"${{{name}." not in str(OmegaConf.to_container(cfg)):
            raise ConfigError(
                f"{no_such_key(name, NODES)}. A helper's name must begin with an underscore"
            )
    _check_nodes(values, added)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", values["train"]["device"]):
        device = values["train"]["device"]
        raise ConfigError(f"train.device is {device!r}, must be 'cpu', 'cuda' or 'cuda:N'")
    _check_choices(values)
    _check_ranges(values)
    _check_branches(values)
    for key in ("train.best_metric", "train.early_stopping.metric"):
        _check_metric(values, key)
    _check_max_detections(values)


def _check_nodes(values: Any, added: Collection[str]) -> None:
    """Check each key and value by itself. An interpolation is left alone."""
    for name in (*HELPERS, *NODES):
        for key, value in walk(values.get(name), name):
            _check_bounds(value, key)
        if name in SCHEMAS and name in values:
            _check_keys(values[name], name, SCHEMAS[name], added)
        for key, value in walk(values.get(name), name):
            if is_call(value):
                _check_call(value, key)
    for key in _CALLS:
        value = at(values, key)
        if not is_call(value) and not _refers(value):
            raise ConfigError(
                f"{key} is {value!r}, must be a call, with a _target_: L(...) in a config file"
            )


def no_such_key(key: str, siblings: Iterable[str], close: str | None = None) -> str:
    """What to say of a key that does not exist: `siblings` is what there is in place of its last
    part, `close` the key that may be meant; None looks for one among the siblings."""
    prefix, _, name = key.rpartition(".")
    siblings = sorted(siblings)
    if close is None:
        near = difflib.get_close_matches(name, siblings, n=1, cutoff=NEAR)
        close = join(prefix, near[0]) if near else ""
    hint = f"did you mean {close!r}? " if close else ""
    return f"no key {key!r}; {hint}{repr(prefix) if prefix else 'the config'} has {siblings}"


def join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Nested containers and values, each with its key, those that hold others first."""
    yield key, value
    if isinstance(value, (dict, list, tuple)):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(child, join(key, name))


def at(values: Any, key: str) -> Any:
    """A key's value in nested dicts; None if it is not there."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def is_call(value: Any) -> bool:
    """Whether a config's value stands for what a call returns."""
    return isinstance(value, (dict, DictConfig)) and "_target_" in value


def _refers(value: Any) -> bool:
    """Whether it is an interpolation that has not been resolved."""
    return isinstance(value, str) and "${" in value


class Signature(NamedTuple):
    """What a callable takes.

    hints: type hint of each keyword argument, those of base classes too while it passes on **.
    required: those that it does not go without.
    is_open: whether it takes others as well.
    """

    hints: dict[str, Any]
    required: set[str]
    is_open: bool


def signature_of(target: Any) -> Signature | None:
    """The arguments of what a `_target_` names; None if that cannot be told."""
    try:
        return _read(locate(target) if isinstance(target, str) else target)
    except Exception:  # no such name, not hashable, or written in C
        return None


@functools.cache
def _read(target: Callable[..., Any]) -> Signature:
    constructors = [target]
    if inspect.isclass(target):
        constructors = [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)]
        constructors = constructors or [target.__new__]
    hints: dict[str, Any] = {}
    required: set[str] = set()
    for i, constructor in enumerate(constructors):
        parameters = inspect.signature(constructor).parameters.values()
        try:
            annotations = typing.get_type_hints(constructor)
        except Exception:  # a hint that names what is imported for type checkers alone
            annotations = {}
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in hints:
                hint = annotations.get(p.name, Any)
                hints[p.name] = typing.Optional[hint] if p.default is None else hint  # noqa: UP045
                # What a base class requires, the class itself may pass.
                if p.default is p.empty and i == 0:
                    required.add(p.name)
        is_open = any(p.kind == p.VAR_KEYWORD for p in parameters)
        if not is_open:
            break
    names = hints.keys() - {"self", "cls", "_cls"}
    return Signature({k: hints[k] for k in names}, required & names, is_open)


LISTS = (list, tuple, abc.Sequence, abc.Iterable)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """What a union is of; of any other type hint itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type hint; True if in doubt."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if is_call(value) or _refers(value) or hint is Any:
        return True
    if len(alternatives(hint)) > 1:
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if value is None:  # detectron2's models go without a proposal_generator, a Module
        return hint in (types.NoneType, object, torch.nn.Module)
    if hint in (bool, str, int, types.NoneType):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if origin is abc.Callable:
        return callable(value)
    if origin in (dict, abc.Mapping):
        return isinstance(value, dict)
    if origin in LISTS:
        elements = [a for a in args if a is not ...] or [Any]
        # However many: detectron2 writes Tuple[float] for several.
        return isinstance(value, (list, tuple)) and all(
            any(fits(v, e) for e in elements) for v in value
        )
    if hint in (torch.Tensor, torch.nn.Module):
        return isinstance(value, hint)
    return True


def schema_hint(key: str) -> Any:
    """Type hint of a key of a node that calls nothing; None for any other key."""
    name, *parts = key.split(".")
    hint: Any = SCHEMAS.get(name)
    for part in parts:
        node = _schema_in(hint)
        hint = typing.get_type_hints(node).get(part) if node else None
    return hint


def _schema_in(hint: Any) -> Any:
    """The dataclass of ours that a hint is, or is optionally; None if there is none."""
    ours = (a for a in alternatives(hint) if getattr(a, "__module__", "") == schema.__name__)
    return next(ours, None)


def _check_keys(
    value: Any, key: str, target: Callable[..., Any], added: Collection[str] = ()
) -> None:
    """Check the keys below a node: the arguments of what it calls, or the fields of a dataclass."""
    signature = signature_of(target)
    if signature is None or _refers(value):
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}, must have keys such as {sorted(signature.hints)}")
    for name, given in value.items():
        path = join(key, name)
        if name in signature.hints:
            hint = signature.hints[name]
            if (nested := _schema_in(hint)) and (given is not None or nested is hint):
                _check_keys(given, path, nested, added)
            elif not fits(given, hint):
                raise ConfigError(f"{path} is {given!r}, must be of type {_shown(hint)}")
        elif name != "_target_" and path not in added and not signature.is_open:
            raise ConfigError(no_such_key(path, signature.hints))
    missing = sorted(signature.required - value.keys())
    if missing and [join(key, name) for name in missing] != [_GIVEN_LATER]:
        name = "" if _schema_in(target) else getattr(target, "__qualname__", repr(target))
        raise ConfigError(f"{key} lacks {missing}{name and f', which {name} needs'}")


def _shown(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return re.sub(r"\b[\w.]+\.", "", name)  # without modules


def _check_call(value: dict[str, Any], key: str) -> None:
    """Check a call against the signature of what it calls."""
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
    _check_keys(value, key, target)


def _check_bounds(value: Any, key: str) -> None:
    bounds = BOUNDS.get(re.sub(r"(\.\d+)+$", "", key).rpartition(".")[2])  # of lists, all elements
    if not bounds or not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    least, most = bounds
    number = "an integer" if bounds == COUNT else "a finite number"
    if not least <= value <= most or (bounds == COUNT and not isinstance(value, int)):
        limit = f" and at most {most:g}" if most < 2**63 else ""
        raise ConfigError(f"{key} is {value!r}, must be {number}, at least {least:g}{limit}")


def _check_choices(values: dict[str, Any]) -> None:
    """Check the names of RoI layers and mask losses, of which there may be a user's own."""
    finders: dict[str, Callable[[str], Any]]
    finders = {"pooler_type": find_roi_layer, "loss_type": find_masks}
    for key, value in walk(values["model"], "model"):
        node, _, name = key.rpartition(".")
        if name in finders and isinstance(value, str) and _is_known(at(values, node)):
            try:
                finders[name](value)
            except ValueError as error:
                raise ConfigError(f"{node}.{error}") from error


def _check_ranges(values: dict[str, Any]) -> None:
    """Check that a range of image sizes has two ends: detectron2's error does not name the key."""
    for key, value in walk(values["dataloader"], "dataloader"):
        lengths = value.get("short_edge_length") if isinstance(value, dict) else None
        if isinstance(lengths, list) and value.get("sample_style") == "range" and len(lengths) != 2:
            raise ConfigError(
                f"{key}.short_edge_length is {lengths}, must be two values, the smallest and the "
                f"largest, as {key}.sample_style is 'range'"
            )


def _check_branches(values: dict[str, Any]) -> None:
    if not _is_known(at(values, "model.roi_heads")):
        return
    tasks = at(values, "dataloader.evaluator.tasks") or ()
    for task, head in (("segm", "mask_head"), ("keypoints", "keypoint_head")):
        if task in tasks and at(values, f"model.roi_heads.{head}") is None:
            raise ConfigError(
                f"dataloader.evaluator.tasks has {task!r}, but there is no model.roi_heads.{head} "
                "to predict it: remove the task"
            )


def _check_metric(values: dict[str, Any], key: str) -> None:
    metric, train = at(values, key), values["train"]
    if metric and key != "train.best_metric" and not (train["eval_period"] or train.get("epochs")):
        raise ConfigError(f"{key} is {metric!r}, but train.eval_period is 0: nothing is evaluated")
    if not metric or not _is_known(at(values, "dataloader.evaluator")):
        return
    tasks = at(values, "dataloader.evaluator.tasks") or ()
    names = [f"{task}/{name}" for task in tasks for name in METRICS.get(task, ())]
    if metric not in names and not metric.startswith(tuple(f"{task}/AP-" for task in tasks)):
        raise ConfigError(f"{key} is {metric!r}, must be one of {names} or TASK/AP-CATEGORY")


def _check_max_detections(values: dict[str, Any]) -> None:
    limit = at(values, "dataset.test.max_detections")
    for key in (
        "model.roi_heads.box_predictor.test_topk_per_image",
        "dataloader.evaluator.max_detections",
    ):
        if at(values, key) not in (None, limit):
            raise ConfigError(
                f"{key} is {at(values, key)}, but dataset.test.max_detections is {limit}: set "
                "only the latter, which limits both the model and the evaluation"
            )


def _is_known(node: Any) -> bool:
    """Whether it calls what is the plugin's or detectron2's; of others one cannot tell."""
    if not is_call(node):
        return False
    target = node["_target_"]
    module = str(getattr(target, "__module__", target))
    return module.split(".")[0] in ("mask_rcnn_plugin", "detectron2")
