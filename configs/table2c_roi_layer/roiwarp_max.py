"""Table 2c, RoIWarp, max: mask AP 27.2, AP50 49.2, AP75 27.1 on minival.

    python train.py --config-file table2c_roi_layer/roiwarp_max --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from .roialign_ave import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.pooler.pooler_type = "RoIWarp"
model.roi_heads.pooler.aggregation = "max"
