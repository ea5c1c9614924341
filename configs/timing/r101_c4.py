"""Sec. 4.4, ResNet-101-C4: 400 ms an image on a Tesla M40; written "~400ms".

    python train.py --config-file timing/r101_c4 --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r101_c4. The paper times a model whose RPN
shares features, as here, after the 4-step training (tools/train_stages.py).
"""

from ..table2a_backbone.r101_c4 import dataloader, dataset, lr_multiplier, model, optimizer, train
