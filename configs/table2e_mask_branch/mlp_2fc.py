"""Table 2e, MLP 1024-1024-80*28^2: mask AP 31.5, AP50 53.7, AP75 32.8 on minival.

    python train.py --config-file table2e_mask_branch/mlp_2fc --num-gpus 8

Ours: not run.

Divergences from the paper: those of table2a_backbone/r50_fpn. The paper does not say what side the
MLP's RoI features have: 14, as the FCN's.
"""

from detectron2.config import LazyCall as L

from mask_rcnn_plugin.modeling import MaskRCNNMLPHead

from .fcn import dataloader, dataset, lr_multiplier, model, optimizer, train

model.roi_heads.mask_head = L(MaskRCNNMLPHead)(
    input_shape=model.roi_heads.mask_head.input_shape,
    num_classes="${..num_classes}",
    fc_dims=[1024, 1024],
    mask_side=28,
    loss_type="sigmoid",
)
