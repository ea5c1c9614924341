"""Table 6, RoIAlign: keypoint AP 64.2, AP50 86.6, AP75 69.7, APm 58.7, APl 73.0 on minival.

    python train.py --config-file table6_keypoint_roi/roialign --num-gpus 8

Ours: not run.

Divergences from the paper: those of table5_multitask/keypoint_only.
"""

from ..table5_multitask.keypoint_only import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)
