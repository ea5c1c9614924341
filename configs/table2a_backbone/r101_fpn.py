"""Table 2a, ResNet-101-FPN: mask AP 35.4, AP50 57.3, AP75 37.5 on minival.

    python train.py --config-file table2a_backbone/r101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_fpn.
"""

from .r50_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "ResNet-101-FPN"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
