"""Settings with which detectron2's zoo trained its C4 models, for its weights in a row's model.

    python eval.py --config-file table2a_backbone/r50_c4+zoo_c4 \\
        --weights COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x

The zoo pools 14 x 14 features, which res5 halves, samples as many points per bin as the bin's size
requires, and keeps more proposals.
"""

from omegaconf import DictConfig

from .zoo_fpn import overlay as zoo_fpn


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    zoo_fpn(cfg)
    heads = cfg.model.roi_heads
    heads.pooler.output_size = 14
    heads.res5.stride = 2
    cfg.model.proposal_generator.post_nms_topk = (2000, 1000)
