"""Mask R-CNN on C5 features, stride 32, with the heads of Fig. 4 right (Table 2d)."""

from detectron2.config import LazyCall as L

from mask_rcnn_plugin.modeling import stage_channels

from .fpn import add_mask_branch, model

_channels = L(stage_channels)(
    name="${.....backbone.name}", stage="res5", width="${.....backbone.width}"
)

add_mask_branch(model)
model.backbone.name = "ResNet-50-C5"
model.proposal_generator.in_features = ["res5"]
model.proposal_generator.head.in_channels = L(stage_channels)(
    name="${....backbone.name}", stage="res5", width="${....backbone.width}"
)
model.proposal_generator.head.num_anchors = 15
model.proposal_generator.anchor_generator.sizes = [[32, 64, 128, 256, 512]]
model.proposal_generator.anchor_generator.strides = [32]
model.proposal_generator.pre_nms_topk = (12000, 6000)
for _branch in ("box", "mask"):
    model.roi_heads[f"{_branch}_in_features"] = ["res5"]
    model.roi_heads[f"{_branch}_pooler"].scales = [1 / 32]
    model.roi_heads[f"{_branch}_head"].input_shape.channels = _channels
