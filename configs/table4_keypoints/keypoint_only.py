"""Table 4, keypoint-only, ResNet-50-FPN: keypoint AP 62.7, AP50 87.0, AP75 68.4, APM 57.4,
APL 71.1 on test-dev.

    python train.py --config-file table4_keypoints/keypoint_only --num-gpus 8

Ours: not run.

Divergences from the paper: the RPN is trained jointly, not separately; the learning rate warms up
over 1000 iterations; the longer edge is at most 1333 pixels and images are flipped, as Detectron
does. Evaluates on minival; test-dev is scored by COCO's server.
"""

from ..common.keypoint_data import dataloader, dataset
from ..common.models.fpn import add_keypoint_branch, model
from ..common.train import lr_multiplier, optimizer, train

add_keypoint_branch(model)
model.roi_heads.num_classes = 1  # person

# Sec. 5: 90k iterations, the rate divided by 10 at 60k and 80k.
train.max_iter = 90_000
lr_multiplier.drop_at = [60 / 90, 80 / 90]

dataloader.train.mapper.use_instance_mask = False
dataloader.evaluator.tasks = ["bbox", "keypoints"]
