"""Table 4, keypoint & mask, ResNet-50-FPN: keypoint AP 63.1, AP50 87.3, AP75 68.7, APM 57.8,
APL 71.4 on test-dev.

    python train.py --config-file table4_keypoints/keypoint_and_mask --num-gpus 8

Ours: not run.

Divergences from the paper: those of keypoint_only.
"""

from ..common.models.fpn import add_mask_branch
from .keypoint_only import dataloader, dataset, lr_multiplier, model, optimizer, train

add_mask_branch(model)
dataloader.train.mapper.use_instance_mask = True
dataloader.evaluator.tasks = ["bbox", "segm", "keypoints"]
