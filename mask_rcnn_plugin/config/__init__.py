"""Configs: loading with overlays and overrides, strictness, printing."""

from mask_rcnn_plugin.config.loading import CONFIG_DIR, get_config, list_configs, list_overlays
from mask_rcnn_plugin.config.printing import deciding, flatten
from mask_rcnn_plugin.errors import ConfigError
from mask_rcnn_plugin.modeling.yaml_keys import add_mask_rcnn_config

__all__ = [
    "CONFIG_DIR",
    "ConfigError",
    "add_mask_rcnn_config",
    "deciding",
    "flatten",
    "get_config",
    "list_configs",
    "list_overlays",
]
