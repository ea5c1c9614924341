"""Table 5, Mask R-CNN, keypoint & mask: box AP 52.0; mask AP 45.1; keypoint AP 64.7 on minival.

    python train.py --config-file table5_multitask/keypoint_and_mask --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/box_only.
"""

from ..common.tasks import add_masks
from .keypoint_only import dataloader, dataset, lr_multiplier, model, optimizer, train

add_masks(model, dataloader)
