"""Sec. 4.4, Faster R-CNN, ResNet-101-C4: Mask R-CNN takes about 20% longer on typical models (Sec.
3.1).

    python train.py --config-file timing/faster_rcnn_r101_c4 --num-gpus 8

Ours: not run.

Divergences from the paper: those of timing/r101_c4.
"""

from ..common.tasks import drop_masks
from .r101_c4 import dataloader, dataset, lr_multiplier, model, optimizer, train

drop_masks(model, dataloader)
