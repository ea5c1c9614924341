"""Table 1, ResNeXt-101-FPN: mask AP 37.1, AP50 60.0, AP75 39.4, APs 16.9, APm 39.9, APl 53.5 on
test-dev.

    python train.py --config-file table1_main/x101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/x101_fpn. Scored by COCO's server, see
common/test_dev.py.
"""

from ..common.test_dev import use_test_dev
from ..table2a_backbone.x101_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train

use_test_dev(dataset, train)
