"""Table 2d, RoIPool: mask AP 23.6, AP50 46.5, AP75 21.6; box AP 28.2, AP50 52.7, AP75 26.9 on
minival.

    python train.py --config-file table2d_stride32/roipool --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2d_stride32/roialign.
"""

from ..common.roi_layer import use_roi_layer
from .roialign import dataloader, dataset, lr_multiplier, model, optimizer, train

use_roi_layer(model, "RoIPool", "max")
