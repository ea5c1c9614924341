"""Configs: loading with overlays and overrides, strictness, printing."""

from mask_rcnn_plugin.config.loading import (
    CONFIG_DIR,
    apply_override,
    deciding,
    flatten,
    get_config,
    list_configs,
    list_overlays,
    plain,
    short_name,
)
from mask_rcnn_plugin.errors import ConfigError
from mask_rcnn_plugin.modeling.yaml_keys import add_mask_rcnn_config

__all__ = [
    "CONFIG_DIR",
    "ConfigError",
    "add_mask_rcnn_config",
    "apply_override",
    "deciding",
    "flatten",
    "get_config",
    "list_configs",
    "list_overlays",
    "plain",
    "short_name",
]
