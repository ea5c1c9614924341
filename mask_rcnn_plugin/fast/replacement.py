"""Modules of a model put in the place of others that compute the same."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from detectron2.layers import Conv2d
from torch import nn

Conv = TypeVar("Conv", bound=Conv2d)
Module = TypeVar("Module", bound=nn.Module)


def replace_modules(module: nn.Module, replacement: Callable[[nn.Module], Any]) -> Any:
    """Put each submodule's replacement in its place.

    Args:
        module: changed in place, unless it is replaced itself.
        replacement: called with `module` and each of its submodules, returns a module or None to
            leave it as it is. Not called with what it returned.

    Returns:
        `module`, or its replacement.
    """
    found = {old: replacement(old) for old in module.modules()}
    new = {old: other for old, other in found.items() if other is not None}
    for name, old in list(module.named_modules(remove_duplicate=False)):
        if name and old in new:
            module.set_submodule(name, new[old])
    for parent in module.modules():
        for value in vars(parent).values():
            if isinstance(value, list):  # detectron2's FPN finds its convolutions in lists
                value[:] = [new.get(v, v) if isinstance(v, nn.Module) else v for v in value]
    return new.get(module, module)


def as_class(module: nn.Module, kind: type[Module]) -> Module:
    """The same module, with its parameters and submodules, as one of a related class."""
    other = kind.__new__(kind)
    vars(other).update(vars(module))
    return other


def renamed(function: FunctionType, name: str) -> FunctionType:
    """The same function under another name, by which torch.jit.script tells methods apart."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    return copy


def conv_like(conv: Conv2d, kind: type[Conv], norm: nn.Module | None) -> Conv:
    """A convolution of another class, with the parameters and activation of `conv`, and `norm`."""
    new = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        norm=norm,
        activation=conv.activation,
        device="meta",  # the parameters follow
    )
    new.weight, new.bias, new.training = conv.weight, conv.bias, conv.training
    return new
