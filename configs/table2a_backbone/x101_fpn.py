"""Table 2a, ResNeXt-101-FPN: mask AP 36.7, AP50 59.5, AP75 38.9 on minival.

    python train.py --config-file table2a_backbone/x101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_fpn.
"""

from .r50_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "ResNeXt-101-FPN"  # 64x4d
model.backbone.stride_in_1x1 = False  # as its ImageNet weights were trained
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/X-101-64x4d"

# Sec. 3.1: one image a GPU, and half the rate.
dataloader.train.total_batch_size = 8
optimizer.lr = 0.01
