"""Table 2e, MLP 1024-1024-1024-80*28^2: mask AP 31.5, AP50 54.0, AP75 32.6 on minival.

    python train.py --config-file table2e_mask_branch/mlp_3fc --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2e_mask_branch/mlp_2fc.
"""

from .mlp_2fc import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.mask_head.fc_dims = [1024, 1024, 1024]
