"""Sec. 4.2, class-agnostic masks: mask AP 29.7 on minival.

    python train.py --config-file class_agnostic/r50_c4 --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from ..table2a_backbone.r50_c4 import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.mask_head.num_classes = 1
