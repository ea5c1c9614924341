"""Turns any config into one that trains on a CPU, on drawn images, from random weights.

    python train.py --config-file table4_keypoints/keypoint_and_mask+synthetic

Same heads, losses and RoI layers with fewer channels; ResNet-18 for the paper's ResNet-50, -34 for
-101; small images; AdamW and a short schedule. The keypoint loss is weighted by a quarter. A config
on COCO's persons sees the drawn people alone. `dataset.synthetic.size` is the side of the
drawn images, and what all images, also one's own, are resized to; the anchors scale with it.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import DictConfig

_BATCH = 8
_BACKBONES = {
    "ResNet-50": "ResNet-18",
    "ResNet-101": "ResNet-34",
    "ResNeXt-101": "ResNeXt-50",
}


def overlay(cfg: DictConfig, size: int = 128) -> None:
    """Change a config in place, for images of `size` pixels a side."""
    drawn = "_".join(f"${{dataset.synthetic.{key}}}" for key in ("size", "train", "val", "seed"))
    cfg.dataset.synthetic = dict(
        root=f"output/synthetic_{drawn}", train=800, val=800, size=size, seed=0
    )
    for split, name in ((cfg.dataset.train, "train"), (cfg.dataset.test, "val")):
        people = "person_keypoints_" if split.names[0].startswith("keypoints_") else ""
        file = f"${{dataset.synthetic.root}}/{people}{name}.json"
        split.json, split.names = file, [file]
        split.images = f"${{dataset.synthetic.root}}/{name}"

    loaders = cfg.dataloader
    loaders.train.total_batch_size = _BATCH
    loaders.train.num_workers = loaders.test.num_workers = 0
    side = "${dataset.synthetic.size}"
    resize = loaders.train.mapper.augmentations[0]
    if "lsj" in cfg:
        cfg.lsj.size = side
    elif resize.sample_style == "range":
        # The same relative range as on COCO, around the image's own size.
        low, high = resize.short_edge_length
        resize.short_edge_length = [f"${{scaled:{low},{high},{side}}}", side]
    else:
        resize.short_edge_length = [side]
    loaders.test.mapper.augmentations[0].short_edge_length = side

    if "name" in cfg.model.backbone:  # one of the plugin's; others are left as they are
        _shrink(cfg.model.backbone)

    rpn = cfg.model.proposal_generator
    # The largest anchor as large as the image, for figures that fill it.
    rpn.anchor_generator.sizes = [
        [f"${{scaled:{anchor},512,{side}}}" for anchor in level]
        for level in rpn.anchor_generator.sizes
    ]
    rpn.pre_nms_topk = (400, 200)
    rpn.post_nms_topk = (200, 50)
    rpn.batch_size_per_image = 64

    heads = cfg.model.roi_heads
    heads.batch_size_per_image = 32
    cfg.dataset.test.max_detections = 20  # at most 5 objects an image
    set_widths(cfg.model, convolutions=64, fully_connected=256)
    if "keypoint_head" in heads:
        # A cross-entropy over 3136 cells starts at 8: on a short schedule it drowns the others.
        heads.keypoint_head.loss_weight = 0.25

    set_short_schedule(cfg)
    cfg.train.init_checkpoint = ""
    cfg.train.max_iter = 1050
    cfg.train.eval_period = 0  # at the end
    cfg.train.checkpointer.period = "${train.max_iter}"
    cfg.train.log_period = 10
    cfg.train.seed = 0
    cfg.train.amp = dict(enabled=True, dtype="auto")


def _shrink(backbone: DictConfig) -> None:
    backbone.norm = "BN"  # from scratch: nothing to freeze
    backbone.freeze_at = 0
    if "width" not in backbone:  # timm's, which have their own sizes
        return
    network, features = backbone.name.rsplit("-", 1)
    backbone.name = f"{_BACKBONES[network]}-{features}"
    if backbone.name.endswith("C4"):
        backbone.width = 32  # its res5 runs on every RoI
    backbone.stride_in_1x1 = False


def set_short_schedule(cfg: DictConfig) -> None:
    """AdamW, and a cosine after a short warm-up: for trainings of minutes."""
    cfg.optimizer = L(torch.optim.AdamW)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
        lr=1e-3,
        weight_decay=0.01,
        fused=True,
    )
    cfg.lr_multiplier = L(WarmupParamScheduler)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
        warmup_factor=0.001,
        warmup_length=0.05,
    )


def set_widths(model: DictConfig, convolutions: int, fully_connected: int) -> None:
    """Channels of the FPN and the heads; the paper has 256 (keypoints: 512) and 1024."""
    if "fpn_channels" in model.backbone:
        model.backbone.fpn_channels = convolutions
    for name, head in model.roi_heads.items():
        if name.endswith("_head"):
            for key, width in (("conv_dims", convolutions), ("fc_dims", fully_connected)):
                if key in head:
                    head[key] = [width] * len(head[key])
