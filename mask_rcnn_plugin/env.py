"""Makes stock detectron2 tools see the plugin, with no edit to them.

    DETECTRON2_ENV_MODULE=mask_rcnn_plugin.env python tools/train_net.py --config-file my.yaml

detectron2 imports the module named in that variable while it is being imported itself and calls
its `setup_environment`. From then on `get_cfg()` has the plugin's keys and the registries have
its backbone, heads and meta-architecture, and `DatasetCatalog` the persons of test-dev.
"""

from mask_rcnn_plugin.data import coco  # noqa: F401  registers test-dev's persons
from mask_rcnn_plugin.modeling.yaml_keys import add_mask_rcnn_config


def setup_environment() -> None:
    """Extend the defaults that `detectron2.config.get_cfg` copies. Called by detectron2."""
    from detectron2.config.defaults import _C

    add_mask_rcnn_config(_C)
