"""Table 1, ResNet-101-FPN: mask AP 35.7, AP50 58.0, AP75 37.8, APs 15.5, APm 38.1, APl 52.4 on
test-dev.

    python train.py --config-file table1_main/r101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r101_fpn. Scored by COCO's server, see
common/test_dev.py.
"""

from ..common.test_dev import use_test_dev
from ..table2a_backbone.r101_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train

use_test_dev(dataset, train)
