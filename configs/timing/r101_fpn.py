"""Sec. 4.4, ResNet-101-FPN: 195 ms an image on a Tesla M40; and 15 ms on a CPU to resize the
outputs.

    python train.py --config-file timing/r101_fpn --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r101_fpn. The paper times a model whose RPN
shares features, as here, after the 4-step training (tools/train_stages.py).
"""

from ..table2a_backbone.r101_fpn import dataloader, dataset, lr_multiplier, model, optimizer, train
