"""Table 4, keypoint-only: keypoint AP 62.7, AP50 87.0, AP75 68.4, APm 57.4, APl 71.1 on test-dev.

    python train.py --config-file table4_keypoints/keypoint_only --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/keypoint_only. Scored by COCO's server, see
common/test_dev.py.
"""

from mask_rcnn_plugin.data.coco import KEYPOINT_TEST_DEV

from ..common.test_dev import use_test_dev
from ..table5_multitask.keypoint_only import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

use_test_dev(dataset, train, KEYPOINT_TEST_DEV)
