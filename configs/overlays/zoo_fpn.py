"""Settings with which detectron2's zoo trained its FPN models, for its weights in a row's model.

    python eval.py --config-file table2a_backbone/r50_fpn+zoo_fpn \\
        --weights COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x

The zoo samples as many points per bin as the bin's size requires; the paper samples 4.
"""

from omegaconf import DictConfig

from ..common.roi_layer import poolers


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    for pooler in poolers(cfg.model):
        if pooler.aggregation == "ave":  # there is no maximum of as many points as a bin needs
            pooler.sampling_ratio = 0
