"""Table 2a, ResNet-50-FPN: mask AP 33.6, AP50 55.2, AP75 35.3 on minival.

    python train.py --config-file table2a_backbone/r50_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: the RPN is trained jointly, not separately (tools/train_stages.py trains
it as the paper does); the learning rate warms up over 1000 iterations; the longer edge is at most
1333 pixels and images are flipped, as Detectron does.
"""

from ..common.data import dataloader, dataset
from ..common.models.fpn import add_mask_branch, model
from ..common.train import lr_multiplier, optimizer, train

add_mask_branch(model)
