"""The training of detectron2's new baselines: from random weights, 100 epochs of COCO.

    python train.py --config-file table2a_backbone/r50_fpn+lsj_100ep --num-gpus 8

Does to any row what new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py does to detectron2's Mask R-CNN:
large-scale jitter, synchronised batch normalisation, also in the heads that it is for, deeper heads
and 64 images a batch. `+lsj_100ep+zoo_fpn` samples RoIs as there too. Ours: not run on COCO.
"""

from omegaconf import DictConfig

from .lsj import overlay as lsj

_HEAD_NORM = "naiveSyncBN_N"  # which takes batches without a RoI


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    if cfg.dataset.synthetic:
        raise ValueError("put +synthetic and +ablation after +lsj_100ep")
    lsj(cfg)
    backbone, heads = cfg.model.backbone, cfg.model.roi_heads
    backbone.update(norm="SyncBN", freeze_at=0)
    if "fpn_norm" in backbone:
        backbone.fpn_norm = "SyncBN"
    cfg.model.proposal_generator.head.conv_dims = [-1, -1]  # as wide as the features
    if "box_head" in heads:
        heads.box_head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm=_HEAD_NORM)
    if "conv_dims" in heads.get("mask_head", {}):
        heads.mask_head.conv_norm = _HEAD_NORM

    cfg.dataloader.train.total_batch_size = 64
    cfg.optimizer.update(lr=0.1, weight_decay=4e-5)
    cfg.train.update(init_checkpoint="", max_iter=184_375)  # x 64 images = 100 x 118,000
    # Not bf16: gradients are sent in fp16, which takes scaled ones, and the heads' norm adds up in
    # float32 only if it gets fp16.
    cfg.train.amp.update(enabled=True, dtype="fp16")
    cfg.train.ddp.fp16_compression = True
    schedule = cfg.lr_multiplier
    schedule.scheduler.values = [1.0, 0.1, 0.01]
    schedule.scheduler.milestones = [163_889, 177_546, 184_375]
    schedule.warmup_factor = 0.067
    schedule.warmup_length.iterations = 500
