"""Table 2b, sigmoid: mask AP 30.3, AP50 51.2, AP75 31.5 on minival.

    python train.py --config-file table2b_mask_loss/sigmoid --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4.
"""

from ..table2a_backbone.r50_c4 import dataloader, dataset, lr_multiplier, model, optimizer, train
