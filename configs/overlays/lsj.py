"""Large-scale jitter: images scaled to 0.1 to 2 times a square, and cut or padded to it.

    python train.py --config-file table2a_backbone/r50_fpn+lsj_100ep --num-gpus 8
    python train.py --config-file table2a_backbone/r50_fpn+finetune+lsj dataset=my/data lsj.size=640

Only the augmentations of detectron2's new baselines; `lsj_100ep` has the rest. Meant for long
training schedules. Test images keep the row's size. `lsj.size` is the square's side in pixels: 1024
as there, or that of drawn images.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from omegaconf import DictConfig


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    cfg.lsj = dict(size="${dataset.synthetic.size}" if cfg.dataset.synthetic else 1024)
    side = "${lsj.size}"
    mapper = cfg.dataloader.train.mapper
    mapper.augmentations = [
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=side, target_width=side),
        L(T.FixedSizeCrop)(crop_size=[side, side]),
        L(T.RandomFlip)(horizontal=True),
    ]
    # Around what a crop leaves of a mask; a row without masks has its boxes cut.
    mapper.recompute_boxes = "${.use_instance_mask}"
