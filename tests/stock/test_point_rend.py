"""PointRend's mask head, which pools for itself (empty POOLER_TYPE), in the plugin's RoI heads."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from mask_rcnn_plugin import add_mask_rcnn_config


def config(meta_architecture: str, roi_heads: str) -> CfgNode:
    from detectron2 import model_zoo
    from detectron2.projects.point_rend import add_pointrend_config

    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    add_pointrend_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    model = cfg.MODEL
    model.META_ARCHITECTURE, model.ROI_HEADS.NAME = meta_architecture, roi_heads
    model.DEVICE, model.MASK_ON = "cpu", True
    model.RESNETS.NORM = "BN"
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.WIDTH_PER_GROUP = 8
    model.RESNETS.RES2_OUT_CHANNELS = model.FPN.OUT_CHANNELS = 16
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 20
    model.ROI_HEADS.NUM_CLASSES = model.POINT_HEAD.NUM_CLASSES = 3
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model.ROI_BOX_HEAD.FC_DIM = 16
    head = model.ROI_MASK_HEAD
    head.NAME, head.POOLER_TYPE, head.OUTPUT_FORMAT = "PointRendMaskHead", "", "bitmap"
    head.POINT_HEAD_ON, head.FC_DIM, head.CONV_DIM = True, 16, 8
    model.POINT_HEAD.FC_DIM, model.POINT_HEAD.SUBDIVISION_STEPS = 16, 2
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    return cfg


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """The plugin's and detectron2's, with the same weights."""
    torch.manual_seed(0)
    theirs = build_model(config("GeneralizedRCNN", "StandardROIHeads"))
    ours = build_model(config("MaskRCNN", "MaskRCNNROIHeads"))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def image() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 44], [20, 10, 60, 60]]))
    instances.gt_classes = torch.tensor([0, 2])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 4:44, 4:40] = masks[1, 10:60, 20:60] = True
    instances.gt_masks = BitMasks(masks)
    pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "height": 64, "width": 64}


def test_losses_are_detectron2s(
    models: tuple[nn.Module, nn.Module], image: dict[str, Any], assert_near: Callable[..., None]
) -> None:
    losses = []
    # The plugin's own draws other proposals.
    sampling = MethodType(ROIHeads.label_and_sample_proposals, models[0].roi_heads)
    models[0].roi_heads.label_and_sample_proposals = sampling
    for model in models:
        torch.manual_seed(1)  # which anchors, proposals and points are drawn
        with EventStorage():
            losses.append(model([image]))
    ours, theirs = losses
    assert ours.keys() == theirs.keys() >= {"loss_mask", "loss_mask_point"}
    for name in theirs:
        assert_near(ours[name], theirs[name], name, least=1e-3)
    ours["loss_mask_point"].backward()
    gradient = models[0].roi_heads.mask_head.point_head.predictor.weight.grad
    assert gradient.abs().max() > 0


def test_masks_are_detectron2s(
    models: tuple[nn.Module, nn.Module], image: dict[str, Any], assert_near: Callable[..., None]
) -> None:
    with torch.no_grad():
        ours, theirs = (model.eval()([image])[0]["instances"] for model in models)
    assert len(theirs) == 4
    assert_near(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)
    assert theirs.pred_masks.any()
