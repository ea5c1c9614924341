"""Table 5, Mask R-CNN, keypoint-only: box AP 50.7; keypoint AP 64.2 on minival.

    python train.py --config-file table5_multitask/keypoint_only --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/box_only.
"""

from ..common.tasks import add_keypoints
from .box_only import dataloader, dataset, lr_multiplier, model, optimizer, train

add_keypoints(model, dataloader)
