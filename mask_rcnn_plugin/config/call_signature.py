"""What a callable takes: names and type hints of its arguments, and what fits them."""

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.data.transforms import Augmentation, Transform
from detectron2.utils.registry import locate

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_NEVER_NONE = (*_LISTS, collections.abc.Callable)
_OBJECTS = (torch.nn.Module, torch.Tensor, Augmentation, Transform)


class Signature(NamedTuple):
    """
    Attributes:
        hints: type hint of each keyword argument, those of base classes too while it passes on **.
        required: those that it does not go without.
        is_open: whether it takes others as well.
    """

    hints: dict[str, Any]
    required: set[str]
    is_open: bool


def signature_of(target: Any) -> Signature | None:
    """The arguments of what a `_target_` names; None if that cannot be told."""
    if isinstance(target, str):
        try:
            target = locate(target)
        except Exception:
            return None
    if not callable(target):
        return None
    try:
        return _read(target)
    except (TypeError, ValueError):  # not hashable, or written in C
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
            types_ = typing.get_type_hints(constructor)
        except Exception:  # a hint that names what is imported for type checkers alone
            types_ = {}
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in hints:
                hint = types_.get(p.name, Any)
                hints[p.name] = typing.Optional[hint] if p.default is None else hint  # noqa: UP045
                # What a base class requires, the class itself may pass.
                if p.default is p.empty and i == 0:
                    required.add(p.name)
        is_open = any(p.kind == p.VAR_KEYWORD for p in parameters)
        if not is_open:
            break
    names = hints.keys() - {"self", "cls", "_cls"}
    return Signature({k: hints[k] for k in names}, required & names, is_open)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type hint says, in doubt yes."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if is_call(value) or hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if value is None:  # means "none", which numbers, switches, lists and functions cannot be
        return hint not in (bool, int, float) and origin not in _NEVER_NONE
    if hint in (bool, str, int):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if hint is types.NoneType:
        return False
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    if origin in _LISTS:
        elements = [a for a in args if a is not ...] or [Any]
        # However many: detectron2 writes Tuple[float] for several.
        return isinstance(value, (list, tuple)) and all(
            any(fits(v, e) for e in elements) for v in value
        )
    # None of them can be written down in a config.
    if isinstance(hint, type) and issubclass(hint, _OBJECTS):
        return isinstance(value, hint)
    return True


def is_call(value: Any) -> bool:
    """Whether a config's value stands for what a call returns."""
    return isinstance(value, dict) and "_target_" in value
