"""Mask R-CNN on ConvNeXt-T-FPN, or on any other model of timm that gives feature maps.

    python train.py --config-file backbones/convnext_tiny --num-gpus 8
    python train.py --config-file backbones/convnext_tiny model.backbone.name=resnet50d.a1_in1k

Ours: not run. Schedule and heads are the paper's; AdamW at 1e-4 and stochastic depth are how
transformers and ConvNeXts are usually fine-tuned.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import get_default_optimizer_params

from mask_rcnn_plugin.modeling import timm_backbone, timm_normalization

from ..common.data import dataloader, dataset
from ..common.models.fpn import add_mask_branch, model
from ..common.train import lr_multiplier, train

add_mask_branch(model)
model.backbone = L(timm_backbone)(
    name="convnext_tiny.fb_in1k",
    freeze_at=0,
    norm="FrozenBN",
    fpn_channels=256,
    fpn_norm="",
    options=dict(drop_path_rate=0.2),
)
model.pixel_mean = L(timm_normalization)(name="${..backbone.name}", key="mean")
model.pixel_std = L(timm_normalization)(name="${..backbone.name}", key="std")
model.input_format = "RGB"
train.init_checkpoint = "timm://${model.backbone.name}"

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=1e-4,
    weight_decay=0.05,
    fused=None,
)
