"""Which tasks a config trains and scores beside boxes: model, mapper and evaluator together."""

from detectron2.data.detection_utils import create_keypoint_hflip_indices
from omegaconf import DictConfig

from mask_rcnn_plugin.data.coco import KEYPOINT_TRAINVAL35K

from .models.fpn import add_keypoint_branch, add_mask_branch


def add_masks(model: DictConfig, dataloader: DictConfig) -> None:
    """Mask R-CNN on an FPN of what had no mask branch."""
    add_mask_branch(model)
    dataloader.train.mapper.use_instance_mask = True
    dataloader.evaluator.tasks.append("segm")


def add_keypoints(model: DictConfig, dataloader: DictConfig) -> None:
    """The keypoint branch of Sec. 5 on an FPN."""
    add_keypoint_branch(model)
    dataloader.train.mapper.use_keypoint = True
    # COCO's persons; train.py puts those of another dataset in their place.
    dataloader.train.mapper.keypoint_hflip_indices = create_keypoint_hflip_indices(
        KEYPOINT_TRAINVAL35K
    )
    dataloader.evaluator.tasks.append("keypoints")


def drop_masks(model: DictConfig, dataloader: DictConfig) -> None:
    """Faster R-CNN: "Mask R-CNN without the mask branch" (Table 3)."""
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads.pop(part, None)
    dataloader.train.mapper.use_instance_mask = False
    dataloader.evaluator.tasks.remove("segm")
