"""Table 2e, FCN 256-256-256-256-256-80: mask AP 33.6, AP50 55.2, AP75 35.3 on minival.

    python train.py --config-file table2e_mask_branch/fcn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_fpn.
"""

from ..table2a_backbone.r50_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train
