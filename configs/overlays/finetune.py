"""Fine-tune COCO's weights on your own data.

    python train.py --config-file table2a_backbone/r50_fpn+finetune dataset=my/data
    python train.py --config-file table2a_backbone/r50_fpn+finetune dataset=my/data \\
        finetune.epochs=30 finetune.batch=4 finetune.lr=0.002

Starts from the zoo's model of the row's kind, or from train.init_checkpoint=FILE; classes that it
knows by the same name are kept. The stem and the first stage stay frozen, as in the row. An epoch
is a pass over your data and ends with an evaluation; the best model is kept in model_best.pth.
"""

from omegaconf import DictConfig

from .zoo_c4 import overlay as zoo_c4
from .zoo_fpn import overlay as zoo_fpn

_NETWORKS = {"ResNet-50": "R_50", "ResNet-101": "R_101"}
_SETTINGS = {"FPN": zoo_fpn, "C4": zoo_c4}


def overlay(cfg: DictConfig) -> None:
    """Change a config in place."""
    heads, tasks = cfg.model.roi_heads, cfg.dataloader.evaluator.tasks
    network, _, features = cfg.model.backbone.get("name", "").rpartition("-")
    if network in _NETWORKS and features in _SETTINGS:  # others keep the weights of their row
        kind = "COCO-Detection/faster_rcnn"
        if "mask_head" in heads:
            kind = "COCO-InstanceSegmentation/mask_rcnn"
        elif "keypoint_head" in heads:
            kind = "COCO-Keypoints/keypoint_rcnn"
        cfg.train.init_checkpoint = f"{kind}_{_NETWORKS[network]}_{features}_3x"
        _SETTINGS[features](cfg)

    batch = cfg.dataloader.train.total_batch_size  # that the row's rate is for
    cfg.finetune = dict(
        epochs=12,
        batch=2,
        lr=f"${{linear_rate:{cfg.optimizer.lr},{batch},${{finetune.batch}}}}",
    )
    cfg.train.epochs = "${finetune.epochs}"
    cfg.dataloader.train.total_batch_size = "${finetune.batch}"
    cfg.optimizer.lr = "${finetune.lr}"
    cfg.train.reference_batch_size = None
    cfg.train.best_metric = f"{next(t for t in ('segm', 'keypoints', 'bbox') if t in tasks)}/AP"
