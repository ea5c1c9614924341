"""Table 2c, RoIPool, max: mask AP 26.9, AP50 48.8, AP75 26.4 on minival.

    python train.py --config-file table2c_roi_layer/roipool_max --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from .roialign_ave import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.pooler.pooler_type = "RoIPool"
model.roi_heads.pooler.aggregation = "max"
