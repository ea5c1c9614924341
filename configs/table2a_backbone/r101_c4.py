"""Table 2a, ResNet-101-C4: mask AP 32.7, AP50 54.2, AP75 34.3 on minival.

    python train.py --config-file table2a_backbone/r101_c4 --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from .r50_c4 import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "ResNet-101-C4"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
