"""Table 6, RoIPool: keypoint AP 59.8, AP50 86.2, AP75 66.7, APm 55.1, APl 67.4 on minival.

    python train.py --config-file table6_keypoint_roi/roipool --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/keypoint_only.
"""

from ..common.roi_layer import use_roi_layer
from .roialign import dataloader, dataset, lr_multiplier, model, optimizer, train

use_roi_layer(model, "RoIPool", "max")
