"""Settings with which detectron2's zoo trained its FPN models, for its weights in a row's model.

    python eval.py --config-file table2a_backbone/r50_fpn+zoo_fpn \\
        --weights COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x

The zoo samples as many points per bin as the bin's size requires; the paper samples 4.
"""

from omegaconf import DictConfig


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    for branch in ("box", "mask", "keypoint"):
        if f"{branch}_pooler" in cfg.model.roi_heads:
            adapt_points(cfg.model.roi_heads[f"{branch}_pooler"])


def adapt_points(pooler: DictConfig) -> None:
    """As many points as the bin's size asks for, of which there is only an average."""
    if pooler.aggregation == "ave":
        pooler.sampling_ratio = 0
