"""Table 1, ResNet-101-C4: mask AP 33.1, AP50 54.9, AP75 34.8, APs 12.1, APm 35.6, APl 51.1 on
test-dev.

    python train.py --config-file table1_main/r101_c4 --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r101_c4. Scored by COCO's server, see
common/test_dev.py.
"""

from ..common.test_dev import use_test_dev
from ..table2a_backbone.r101_c4 import dataloader, dataset, lr_multiplier, model, optimizer, train

use_test_dev(dataset, train)
