"""The learning rate of a batch, for configs: ${linear_rate:RATE,REFERENCE,BATCH}."""

from inspect import signature
from typing import Any

from omegaconf import OmegaConf


def linear_rate(rate: float, reference: int, batch: int) -> float:
    """The learning rate for a batch size by the linear scaling rule.

    Args:
        rate: that of a batch of `reference` images.
        batch: in images.
    """
    return rate * batch / reference


# Before OmegaConf 2.4 a function of this name gave texts.
_register: Any = OmegaConf.register_resolver
if "replace" not in signature(_register).parameters:
    _register = OmegaConf.register_new_resolver
_register("linear_rate", linear_rate, replace=True)
