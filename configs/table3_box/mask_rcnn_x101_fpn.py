"""Table 3, Mask R-CNN, ResNeXt-101-FPN: box AP 39.8, AP50 62.3, AP75 43.4, APs 22.1, APm 43.2, APl
51.2 on test-dev.

    python train.py --config-file table3_box/mask_rcnn_x101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table1_main/x101_fpn.
"""

from ..table1_main.x101_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train
