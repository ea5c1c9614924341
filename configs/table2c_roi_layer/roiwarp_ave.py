"""Table 2c, RoIWarp, ave: mask AP 27.1, AP50 48.9, AP75 27.1 on minival.

    python train.py --config-file table2c_roi_layer/roiwarp_ave --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from .roialign_ave import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.pooler.pooler_type = "RoIWarp"
