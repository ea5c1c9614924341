"""The overlay "synthetic" with a smaller model, so that a row trains in minutes on one CPU core.

    python train.py --config-file table2c_roi_layer/roipool_max+ablation train.seed=1

For setting rows beside each other (tools/reproduce.py --scale synthetic): ResNet-10 with a quarter
of the channels, heads with an eighth, few RoIs an image and half of them positive. What that saves
goes into more iterations, of 4 images each, and larger images: at stride 32 a figure of the
smallest kind then still covers a cell.
"""

from omegaconf import DictConfig

from .synthetic import overlay as synthetic_overlay
from .synthetic import set_widths


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    synthetic_overlay(cfg, size=192)
    cfg.dataset.synthetic.update(train=1200, val=400)
    cfg.dataloader.train.total_batch_size = 4

    backbone = cfg.model.backbone
    if "width" in backbone:  # the plugin's ResNet
        backbone.name = backbone.name.replace("ResNet-18", "ResNet-10")
        backbone.width = 16
    set_widths(cfg.model, convolutions=32, fully_connected=128)

    rpn = cfg.model.proposal_generator
    rpn.pre_nms_topk = (150, 100)
    rpn.post_nms_topk = (60, 20)

    heads = cfg.model.roi_heads
    heads.batch_size_per_image = 16
    heads.positive_fraction = 0.5
    cfg.dataset.test.max_detections = 10

    cfg.optimizer.lr = 3e-3
    cfg.train.max_iter = 2000
    cfg.train.checkpointer.period = 500
