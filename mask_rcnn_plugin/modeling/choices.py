"""What a config chooses by name: one of the plugin's, one that is registered, or a class's own."""

from collections.abc import Callable, Mapping
from typing import Any

from detectron2.utils.registry import locate
from fvcore.common.registry import Registry

# For `pooler_type`: what `RoIPooler` makes layers of.
ROI_LAYER_REGISTRY = Registry("ROI_LAYER")
# For `loss_type`: last layers of mask heads, as `IndependentMasks` is one.
MASK_LOSS_REGISTRY = Registry("MASK_LOSS")


def chosen(
    key: str,
    choice: str | Callable[..., Any],
    ours: Mapping[str, Callable[..., Any]],
    registry: Registry,
) -> Callable[..., Any]:
    """What a choice names.

    Args:
        key: of the config, for the message.
        choice: a name among `ours` or in the registry, the full name of a class that can be
            imported ("my_layers.Tilted"), or itself.

    Raises:
        ValueError: if it names nothing.
    """
    if callable(choice):
        return choice
    if choice in ours:
        return ours[choice]
    if choice in registry:
        return registry.get(choice)
    problem = ""
    if "." in choice:
        try:
            return locate(choice)
        except Exception as error:  # of a module that fails while it is imported
            problem = f": {str(error).splitlines()[0]}"
    names = [*ours, *(name for name, _ in registry)]
    raise ValueError(
        f"{key} is {choice!r}, must be one of {names}, a class or the full name of one{problem}"
    )
