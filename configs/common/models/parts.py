"""What every model of the paper shares: RPN, sampling, box branch."""

from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead

from mask_rcnn_plugin.modeling import MaskRCNNAnchorGenerator, MaskRCNNBoxPredictor, MaskRCNNRPN

# One level: 5 scales x 3 aspect ratios (Faster R-CNN). An FPN spreads the scales over P2..P6.
rpn = L(MaskRCNNRPN)(
    in_features=None,
    head=L(StandardRPNHead)(in_channels=None, num_anchors=15),
    anchor_generator=L(MaskRCNNAnchorGenerator)(
        sizes=[[32, 64, 128, 256, 512]],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=None,
        offset=0.0,
    ),
    anchor_matcher=L(Matcher)(
        thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    smooth_l1_beta=1 / 9,
    batch_size_per_image=256,
    positive_fraction=0.5,
    pre_nms_topk=(12000, 6000),
    post_nms_topk=(2000, 300),  # train, test; Sec. 3.1: 300 proposals at test for C4
    nms_thresh=0.7,
)

proposal_matcher = L(Matcher)(
    thresholds=[0.5],
    labels=[0, 1],
    allow_low_quality_matches=False,  # Sec. 3.1: positive from 0.5
)

# L_cls and L_box "are identical as those defined in Fast R-CNN" (Sec. 3): smooth L1 with beta 1.
box_predictor = L(MaskRCNNBoxPredictor)(
    input_shape=None,
    test_score_thresh=0.05,
    test_nms_thresh=0.5,
    # Those with the highest scores; 100 (Sec. 3.1) for a model without a dataset.
    test_topk_per_image="${oc.select:dataset.test.max_detections,100}",
    box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
    smooth_l1_beta=1.0,
    num_classes="${..num_classes}",
)

# BGR, not scaled: as the MSRA ImageNet weights were trained.
pixel_mean = [103.530, 116.280, 123.675]
pixel_std = [1.0, 1.0, 1.0]
