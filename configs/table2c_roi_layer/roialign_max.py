"""Table 2c, RoIAlign, max: mask AP 30.2, AP50 51.0, AP75 31.8 on minival.

    python train.py --config-file table2c_roi_layer/roialign_max --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from .roialign_ave import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.pooler.aggregation = "max"
