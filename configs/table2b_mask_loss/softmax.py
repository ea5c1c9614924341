"""Table 2b, softmax: mask AP 24.8, AP50 44.1, AP75 25.1 on minival.

    python train.py --config-file table2b_mask_loss/softmax --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_c4. The paper says no more than "per-pixel
softmax and multinomial loss": here the cells outside the object are a class of their own,
background; a mask is where the predicted class has a probability above 0.5, as with sigmoid, not
where it is the largest.
"""

from .sigmoid import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.mask_head.loss_type = "softmax"
