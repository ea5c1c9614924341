"""Table 4, keypoint & mask: keypoint AP 63.1, AP50 87.3, AP75 68.7, APm 57.8, APl 71.4 on test-dev.

    python train.py --config-file table4_keypoints/keypoint_and_mask --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/keypoint_and_mask. Scored by COCO's server,
see common/test_dev.py.
"""

from mask_rcnn_plugin.data.coco import KEYPOINT_TEST_DEV

from ..common.test_dev import use_test_dev
from ..table5_multitask.keypoint_and_mask import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

use_test_dev(dataset, train, KEYPOINT_TEST_DEV)
