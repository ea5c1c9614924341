"""Table 3, Faster R-CNN, RoIAlign, ResNet-101-FPN: box AP 37.3, AP50 59.6, AP75 40.3, APs 19.8, APm
40.2, APl 48.8 on test-dev.

    python train.py --config-file table3_box/faster_rcnn_r101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table1_main/r101_fpn.
"""

from ..common.tasks import drop_masks
from .mask_rcnn_r101_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train

drop_masks(model, dataloader)
