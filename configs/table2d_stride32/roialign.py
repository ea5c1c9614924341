"""Table 2d, RoIAlign: mask AP 30.9, AP50 51.8, AP75 32.1; box AP 34.0, AP50 55.3, AP75 36.4 on
minival.

    python train.py --config-file table2d_stride32/roialign --num-gpus 8

Ours: not run.

Divergences from the paper: the RPN is trained jointly, not separately (tools/train_stages.py trains
it as the paper does); the learning rate warms up over 1000 iterations; the longer edge is at most
1333 pixels and images are flipped, as Detectron does. The paper does not say how many proposals and
sampled RoIs C5 features get: those of the FPN.
"""

from ..common.data import dataloader, dataset
from ..common.models.c5 import model
from ..common.train import lr_multiplier, optimizer, train
