"""Table 5, Faster R-CNN: box AP 52.5 on minival.

    python train.py --config-file table5_multitask/box_only --num-gpus 8

Ours: not run.

Divergences from the paper: the RPN is trained jointly, not separately (tools/train_stages.py trains
it as the paper does); the learning rate warms up over 1000 iterations; the longer edge is at most
1333 pixels and images are flipped, as Detectron does. All rows of the table train on the same data,
by the schedule of Sec. 5; the paper says the former.
"""

from ..common.keypoint_data import dataloader, dataset
from ..common.models.fpn import model
from ..common.tasks import drop_masks
from ..common.train import lr_multiplier, optimizer, train

drop_masks(model, dataloader)
model.roi_heads.num_classes = 1  # person

# Sec. 5: 90k iterations, the rate divided by 10 at 60k and 80k.
train.max_iter = 90_000
lr_multiplier.scheduler.values = [1.0, 0.1, 0.01]
lr_multiplier.scheduler.milestones = [60_000, 80_000, 90_000]
