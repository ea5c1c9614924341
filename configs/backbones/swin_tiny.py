"""Mask R-CNN on Swin-T-FPN.

    python train.py --config-file backbones/swin_tiny --num-gpus 8

Ours: not run. All else is that of backbones/convnext_tiny.
"""

from .convnext_tiny import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "swin_tiny_patch4_window7_224.ms_in1k"
