"""Table 5, Mask R-CNN, mask-only: box AP 53.6; mask AP 45.8 on minival.

    python train.py --config-file table5_multitask/mask_only --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/box_only.
"""

from ..common.tasks import add_masks
from .box_only import dataloader, dataset, lr_multiplier, model, optimizer, train

add_masks(model, dataloader)
