"""Sec. 4.2, RoIPool: RoIAlign gains 1.5 mask AP and 0.5 box AP over it.

    python train.py --config-file fpn_roi_layer/roipool --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_fpn. The paper does not name the depth:
50, as in its other FPN ablations.
"""

from ..common.roi_layer import use_roi_layer
from ..table2a_backbone.r50_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train

use_roi_layer(model, "RoIPool", "max")
