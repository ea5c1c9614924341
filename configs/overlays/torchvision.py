"""Turns an FPN row into torchvision's Faster, Mask or Keypoint R-CNN, to use its weights.

    python train.py --config-file table2a_backbone/r50_fpn+finetune+torchvision dataset=my/data \\
        train.init_checkpoint=CONVERTED

For weights that tools/convert_weights.py has converted. Images are RGB, RoIAlign is the first
version, half a cell off, and anchors are rounded.
"""

from omegaconf import DictConfig

from mask_rcnn_plugin.errors import ConfigError
from mask_rcnn_plugin.modeling import TorchvisionAnchorGenerator

from ..common.roi_layer import poolers


def overlay(cfg: DictConfig) -> None:
    """Change a config in place.

    Raises:
        ConfigError: for a backbone that torchvision's R-CNNs do not have.
    """
    model = cfg.model
    backbone = model.backbone.get("name", "")
    if not backbone.endswith("-FPN"):
        raise ConfigError(
            f"model.backbone.name is {backbone!r}, must be a ResNet with an FPN for +torchvision"
        )
    cfg.train.init_checkpoint = ""  # the row's weights are for BGR and another stride
    model.input_format = "RGB"
    model.pixel_mean = [123.675, 116.28, 103.53]
    model.pixel_std = [58.395, 57.12, 57.375]
    model.backbone.stride_in_1x1 = False
    model.proposal_generator.anchor_generator._target_ = TorchvisionAnchorGenerator
    model.proposal_generator.min_box_size = 1e-3
    for pooler in poolers(model):
        pooler.update(pooler_type="ROIAlign", aggregation="ave", sampling_ratio=2)
    if "mask_head" in model.roi_heads:
        model.roi_heads.mask_head.loss_type = "sigmoid"
