"""Table 3, Mask R-CNN, ResNet-101-FPN: box AP 38.2, AP50 60.3, AP75 41.7, APs 20.1, APm 41.1, APl
50.2 on test-dev.

    python train.py --config-file table3_box/mask_rcnn_r101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table1_main/r101_fpn.
"""

from ..table1_main.r101_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train
