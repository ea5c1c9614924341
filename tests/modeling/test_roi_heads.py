"""RoI heads: parity with detectron2's, both front ends, C4 and C5 variants, empty inputs."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode, LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
    build_roi_heads,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

from mask_rcnn_plugin import add_mask_rcnn_config
from mask_rcnn_plugin.config import CONFIG_DIR
from mask_rcnn_plugin.modeling import (
    MaskRCNNC4ROIHeads,
    MaskRCNNFCNHead,
    MaskRCNNKeypointHead,
    MaskRCNNROIHeads,
    RoIPooler,
    res5_head,
    stage_channels,
)

Check = Callable[..., None]
Make = Callable[..., Instances]

FPN = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 6)}
C4 = {"res4": ShapeSpec(channels=64, stride=16)}
IMAGE = (96, 128)
BRANCHES = ("BOX", "MASK", "KEYPOINT")


def base_config() -> CfgNode:
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    # All that may be: which are sampled of more is left to chance.
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 100, 1.0
    for branch in BRANCHES:
        head = cfg.MODEL[f"ROI_{branch}_HEAD"]
        head.POOLER_TYPE, head.POOLER_SAMPLING_RATIO = "RoIAlign", 2
    return cfg


def fpn_config() -> CfgNode:
    cfg = base_config()
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_HEADS.NAME = "MaskRCNNROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(FPN)
    box, mask, keypoint = (cfg.MODEL[f"ROI_{branch}_HEAD"] for branch in BRANCHES)
    box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 16, 7
    mask.NAME, mask.NUM_CONV, mask.CONV_DIM = "MaskRCNNFCNHead", 2, 8
    keypoint.NAME, keypoint.NUM_KEYPOINTS = "MaskRCNNKeypointHead", 3
    keypoint.CONV_DIMS = (8, 8)
    return cfg


def c4_config(resolution: int = 7) -> CfgNode:
    """The C4 heads of a ResNet-50 an eighth as wide."""
    cfg = base_config()
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.ROI_HEADS.NAME = "MaskRCNNC4ROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = resolution
    mask = cfg.MODEL.ROI_MASK_HEAD
    mask.NAME, mask.NUM_CONV, mask.CONV_DIM = "MaskRCNNFCNHead", 0, 8
    return cfg


def stock(cfg: CfgNode) -> CfgNode:
    """The same model out of detectron2's own parts."""
    cfg = cfg.clone()
    heads = {"MaskRCNNROIHeads": "StandardROIHeads", "MaskRCNNC4ROIHeads": "Res5ROIHeads"}
    cfg.MODEL.ROI_HEADS.NAME = heads[cfg.MODEL.ROI_HEADS.NAME]
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "KRCNNConvDeconvUpsampleHead"
    layers = {"RoIAlign": "ROIAlignV2", "RoIPool": "ROIPool"}
    for branch in BRANCHES:
        head = cfg.MODEL[f"ROI_{branch}_HEAD"]
        head.POOLER_TYPE = layers[head.POOLER_TYPE]
    return cfg


def features_of(shapes: dict[str, ShapeSpec], images: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(
            images, s.channels, IMAGE[0] // s.stride, IMAGE[1] // s.stride, generator=generator
        ).requires_grad_()
        for name, s in shapes.items()
    }


def proposals_near(targets: list[Instances]) -> list[Instances]:
    """What an RPN might give: boxes around each object, and some anywhere."""
    generator = torch.Generator().manual_seed(2)
    results = []
    for target in targets:
        near = target.gt_boxes.tensor.repeat(5, 1)
        near = near + torch.randn(near.shape, generator=generator) * 4
        corners = torch.rand(12, 2, 2, generator=generator) * torch.tensor([IMAGE[1], IMAGE[0]])
        anywhere = torch.cat([corners.amin(1), corners.amax(1) + 2], dim=1)
        boxes = Boxes(torch.cat([near, anywhere]))
        boxes.clip(IMAGE)
        logits = torch.linspace(2, -2, len(boxes))
        results.append(Instances(IMAGE, proposal_boxes=boxes, objectness_logits=logits))
    return results


def pair(cfg: CfgNode, shapes: dict[str, ShapeSpec], redraw: Check) -> tuple[nn.Module, nn.Module]:
    """Our heads and detectron2's on the same weights."""
    theirs, ours = build_roi_heads(stock(cfg), shapes), build_roi_heads(cfg, shapes)
    redraw(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for module in [*ours.modules(), *theirs.modules()]:
        if isinstance(module, ROIPooler):
            module.canonical_box_size = 32  # spreads the small boxes over the levels
    return ours, theirs


def train(heads: nn.Module, features: dict[str, Tensor], targets: list[Instances]) -> dict:
    torch.manual_seed(0)  # of the sampling
    with EventStorage():
        return heads(None, features, proposals_near(targets), targets)[1]


VARIANTS = pytest.mark.parametrize(
    ("make_config", "shapes"), [(fpn_config, FPN), (lambda: c4_config(14), C4)], ids=["fpn", "c4"]
)


@VARIANTS
@pytest.mark.parametrize("objects", [(3, 2), (3, 0)])
@pytest.mark.parametrize("pooler_type", ["RoIAlign", "RoIPool"])
def test_parity_in_training(
    make_config: Callable[[], CfgNode],
    shapes: dict[str, ShapeSpec],
    objects: tuple[int, int],
    pooler_type: str,
    redraw: Check,
    ground_truth: Make,
    assert_same_training: Check,
) -> None:
    cfg = make_config()
    for branch in BRANCHES:
        cfg.MODEL[f"ROI_{branch}_HEAD"].POOLER_TYPE = pooler_type
    ours, theirs = pair(cfg, shapes, redraw)
    targets = [ground_truth(n) for n in objects]
    x, y = features_of(shapes), features_of(shapes)
    losses, expected = train(ours, x, targets), train(theirs, y, targets)
    branches = {"loss_cls", "loss_box_reg", "loss_mask"} | (
        {"loss_keypoint"} if cfg.MODEL.KEYPOINT_ON else set()
    )
    assert set(losses) == branches
    # Not every level need have an RoI.
    read = [k for k in x if _reaches(expected, y[k])]
    assert len(read) >= min(len(x), 3)
    assert_same_training(
        (ours, losses, [x[k] for k in read]), (theirs, expected, [y[k] for k in read])
    )


def _reaches(losses: dict[str, Tensor], feature: Tensor) -> bool:
    grad = torch.autograd.grad(sum(losses.values()), feature, retain_graph=True, allow_unused=True)
    return grad[0] is not None and bool(grad[0].abs().max() > 0)


@VARIANTS
def test_parity_in_inference(
    make_config: Callable[[], CfgNode],
    shapes: dict[str, ShapeSpec],
    redraw: Check,
    ground_truth: Make,
    assert_near: Check,
) -> None:
    ours, theirs = pair(make_config(), shapes, redraw)
    ours.eval()
    theirs.eval()
    features = features_of(shapes)
    proposals = proposals_near([ground_truth(3), ground_truth(1)])
    with torch.no_grad():
        results, _ = ours(None, features, proposals)
        expected, _ = theirs(None, features, proposals)
    for i, j in zip(results, expected, strict=True):
        assert len(i) == len(j) > 1
        assert i.pred_classes.tolist() == j.pred_classes.tolist()
        assert_near(i.pred_boxes.tensor, j.pred_boxes.tensor)
        assert_near(i.scores, j.scores)
        assert_near(i.pred_masks, j.pred_masks, tolerance=1e-4)
        assert (j.pred_masks - 0.5).abs().max() > 0.2
        if j.has("pred_keypoints"):
            assert_near(i.pred_keypoints, j.pred_keypoints)
        assert i.has("pred_keypoints") == j.has("pred_keypoints") == (shapes is FPN)


# detectron2 logs the mean number of positives over the images that have any.
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@VARIANTS
def test_images_without_objects(
    make_config: Callable[[], CfgNode],
    shapes: dict[str, ShapeSpec],
    redraw: Check,
    ground_truth: Make,
) -> None:
    heads = build_roi_heads(make_config(), shapes)
    redraw(heads)
    losses = train(heads, features_of(shapes), [ground_truth(0), ground_truth(0)])
    for name in ("loss_box_reg", "loss_mask", *(["loss_keypoint"] if shapes is FPN else [])):
        assert losses[name].item() == 0
    assert losses["loss_cls"].item() > 0
    sum(losses.values()).backward()
    for name, p in heads.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            if "mask_head" in name or "keypoint_head" in name:
                assert p.grad.eq(0).all(), name


@VARIANTS
def test_a_sampling_of_ones_own(
    make_config: Callable[[], CfgNode],
    shapes: dict[str, ShapeSpec],
    redraw: Check,
    ground_truth: Make,
    assert_near: Check,
) -> None:
    """Whose positives come last."""

    class Reversed:
        def _sample_proposals(self, *args):  # type: ignore[no-untyped-def]
            return [x.flip(0) for x in super()._sample_proposals(*args)]

    results = []
    for heads in pair(make_config(), shapes, redraw):
        heads.__class__ = type("Own", (Reversed, type(heads)), {})
        results.append(train(heads, features_of(shapes), [ground_truth(3), ground_truth(2)]))
    assert results[0].keys() == results[1].keys()
    for name, loss in results[1].items():
        assert_near(results[0][name], loss, name)


def test_objects_without_visible_keypoints(redraw: Check, ground_truth: Make) -> None:
    heads = build_roi_heads(fpn_config(), FPN)
    redraw(heads)
    targets = [ground_truth(3)]
    targets[0].gt_keypoints.tensor[..., 2] = 0
    losses = train(heads, features_of(FPN, 1), targets)
    assert losses["loss_keypoint"].item() == 0
    assert losses["loss_mask"].item() > 0
    sum(losses.values()).backward()
    for name, p in heads.keypoint_head.named_parameters():
        assert p.grad.eq(0).all(), name


@VARIANTS
def test_no_detection(
    make_config: Callable[[], CfgNode], shapes: dict[str, ShapeSpec], ground_truth: Make
) -> None:
    cfg = make_config()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0
    heads = build_roi_heads(cfg, shapes).eval()
    with torch.no_grad():
        results, losses = heads(
            None, features_of(shapes), proposals_near([ground_truth(3), ground_truth(0)])
        )
    assert losses == {}
    side = 28 if shapes is FPN else 14
    for i in results:
        assert len(i) == 0
        assert i.pred_masks.shape == (0, 1, side, side)
        if shapes is FPN:
            assert i.pred_keypoints.shape == (0, 3, 3)


@pytest.mark.parametrize("mask_on", [False, True])
@pytest.mark.parametrize("keypoint_on", [False, True])
def test_branches_are_optional(mask_on: bool, keypoint_on: bool, ground_truth: Make) -> None:
    cfg = fpn_config()
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = mask_on, keypoint_on
    heads = build_roi_heads(cfg, FPN)
    losses = train(heads, features_of(FPN, 1), [ground_truth(3)])
    assert ("loss_mask" in losses) == mask_on
    assert ("loss_keypoint" in losses) == keypoint_on


def matcher() -> DictConfig:
    return LazyCall(Matcher)(thresholds=[0.5], labels=[0, 1])


def predictor(channels: int) -> DictConfig:
    return LazyCall(FastRCNNOutputLayers)(
        input_shape=LazyCall(ShapeSpec)(channels=channels),
        box2box_transform=LazyCall(Box2BoxTransform)(weights=[10, 10, 5, 5]),
        num_classes=3,
    )


def lazy_fpn() -> DictConfig:
    def pooler(output_size: int) -> DictConfig:
        return LazyCall(RoIPooler)(
            output_size=output_size, scales=[1 / s.stride for s in FPN.values()]
        )

    def shape(side: int) -> DictConfig:
        return LazyCall(ShapeSpec)(channels=8, height=side, width=side)

    return LazyCall(MaskRCNNROIHeads)(
        num_classes=3,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=matcher(),
        box_in_features=list(FPN),
        box_pooler=pooler(7),
        box_head=LazyCall(FastRCNNConvFCHead)(input_shape=shape(7), conv_dims=[], fc_dims=[16, 16]),
        box_predictor=predictor(16),
        mask_in_features=list(FPN),
        mask_pooler=pooler(14),
        mask_head=LazyCall(MaskRCNNFCNHead)(
            input_shape=shape(14), num_classes=3, conv_dims=[8, 8, 8]
        ),
        keypoint_in_features=list(FPN),
        keypoint_pooler=pooler(14),
        keypoint_head=LazyCall(MaskRCNNKeypointHead)(
            input_shape=shape(14), num_keypoints=3, conv_dims=[8, 8]
        ),
    )


def lazy_c4(resolution: int, depth: int) -> DictConfig:
    name = f"ResNet-{depth}-C4"
    channels = stage_channels(name, "res5")
    return LazyCall(MaskRCNNC4ROIHeads)(
        num_classes=3,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=matcher(),
        in_features=["res4"],
        pooler=LazyCall(RoIPooler)(output_size=resolution, scales=[1 / 16]),
        res5=LazyCall(res5_head)(name=name, stride=resolution // 7),
        box_predictor=predictor(channels),
        mask_head=LazyCall(MaskRCNNFCNHead)(
            input_shape=LazyCall(ShapeSpec)(channels=channels), num_classes=3, conv_dims=[8]
        ),
    )


def test_yaml_and_lazy_config_give_equal_fpn_heads() -> None:
    from_yaml, from_lazy = build_roi_heads(fpn_config(), FPN), instantiate(lazy_fpn())
    assert type(from_yaml) is type(from_lazy) is MaskRCNNROIHeads
    assert shapes_of(from_yaml) == shapes_of(from_lazy)


@pytest.mark.parametrize("resolution", [7, 14])
@pytest.mark.parametrize("depth", [18, 50])
def test_yaml_and_lazy_config_give_equal_c4_heads(depth: int, resolution: int) -> None:
    cfg = c4_config(resolution)
    res2 = 256 if depth == 50 else 64
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = res2, 64
    with torch.device("meta"):
        from_yaml = build_roi_heads(cfg, {"res4": ShapeSpec(channels=4 * res2, stride=16)})
        from_lazy = instantiate(lazy_c4(resolution, depth))
    assert type(from_yaml) is type(from_lazy) is MaskRCNNC4ROIHeads
    assert shapes_of(from_yaml) == shapes_of(from_lazy)
    for one, other in zip(from_yaml.res5.modules(), from_lazy.res5.modules(), strict=True):
        assert type(one) is type(other)
        if isinstance(one, nn.Conv2d):
            assert one.stride == other.stride


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("pooler_type", "aggregation"),
    [("RoIPool", "max"), ("RoIWarp", "ave"), ("RoIAlign", "max"), ("ROIAlign", "ave")],
)
def test_yaml_keys_choose_each_branchs_pooler(pooler_type: str, aggregation: str) -> None:
    cfg = fpn_config()
    plain = repr(build_roi_heads(cfg, FPN).box_pooler)
    for branch in BRANCHES:
        changed = cfg.clone()
        head = changed.MODEL[f"ROI_{branch}_HEAD"]
        head.POOLER_TYPE, head.POOLER_AGGREGATION = pooler_type, aggregation
        head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO = 5, 3
        changed.freeze()
        heads = build_roi_heads(changed, FPN)
        for other in BRANCHES:
            got = getattr(heads, f"{other.lower()}_pooler")
            scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
            expected = RoIPooler(5, scales, 3, pooler_type, aggregation=aggregation)
            assert (repr(got) == repr(expected)) == (other == branch)
    assert "aligned=True, aggregation='ave'" in plain
    assert cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "RoIAlign"


def test_yaml_keys_choose_the_c4_pooler() -> None:
    cfg = c4_config(7)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "RoIWarp"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_AGGREGATION = "max"
    pooler = build_roi_heads(cfg, C4).pooler
    assert repr(pooler) == repr(RoIPooler(7, [1 / 16], 2, "RoIWarp", aggregation="max"))


@pytest.mark.parametrize("resolution", [7, 14])
def test_c4_predicts_14x14_masks_from_7x7_features(resolution: int, ground_truth: Make) -> None:
    heads = build_roi_heads(c4_config(resolution), C4)
    seen = []
    heads.mask_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    losses = train(heads, features_of(C4, 1), [ground_truth(3)])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    assert seen[0][1:] == (128, 7, 7)
    assert heads.pooler.output_size == (resolution, resolution)
    heads.eval()
    heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        results, _ = heads(None, features_of(C4, 1), proposals_near([ground_truth(3)]))
    assert results[0].pred_masks.shape[1:] == (1, 14, 14)
    assert len(results[0]) > 0


@pytest.mark.parametrize("resolution", [7, 14])
def test_c4_takes_an_mlp_mask_head(resolution: int, ground_truth: Make) -> None:
    cfg = c4_config(resolution)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNMLPHead"
    cfg.MODEL.ROI_MASK_HEAD.FC_DIMS = [8]
    losses = train(build_roi_heads(cfg, C4), features_of(C4, 1), [ground_truth(3)])
    assert losses["loss_mask"].isfinite()


def test_c4_positive_rois_alone_reach_the_mask_head(ground_truth: Make) -> None:
    cfg = c4_config()
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 16, 0.25
    heads = build_roi_heads(cfg, C4)
    seen = []
    heads.mask_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    targets = [ground_truth(2)]
    train(heads, features_of(C4, 1), targets)
    features, (instances,) = seen[0]
    assert len(features) == len(instances) > 0
    assert instances.gt_classes.max() < 3
    # At most a quarter of 16 sampled RoIs is positive.
    assert len(instances) <= 4


@pytest.mark.parametrize("resolution", [6, 8, 28])
def test_c4_refuses_other_resolutions(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"POOLER_RESOLUTION is {resolution}, must be 7"):
        build_roi_heads(c4_config(resolution), C4)


def test_c4_has_no_keypoint_branch() -> None:
    cfg = c4_config()
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match="which has no keypoint branch"):
        build_roi_heads(cfg, C4)


@pytest.mark.parametrize("branch", ["mask", "keypoint"])
@pytest.mark.parametrize("part", ["in_features", "head"])
def test_refuses_part_of_a_branch(branch: str, part: str) -> None:
    cfg = lazy_fpn()
    del cfg[f"{branch}_{part}"]
    with pytest.raises(ValueError, match=f"the {branch} branch has"):
        instantiate(cfg)


@pytest.mark.parametrize("branch", ["mask", "keypoint"])
def test_a_pooled_head_needs_a_pooler(branch: str) -> None:
    cfg = lazy_fpn()
    del cfg[f"{branch}_pooler"]
    with pytest.raises(ValueError, match=f"{branch}_pooler"):
        instantiate(cfg)


@pytest.mark.parametrize(
    ("branch", "head"),
    [
        ("MASK", "MaskRCNNFCNHead"),
        ("MASK", "MaskRCNNMLPHead"),
        ("KEYPOINT", "MaskRCNNKeypointHead"),
    ],
)
@pytest.mark.parametrize("heads", ["MaskRCNNROIHeads", "StandardROIHeads"])
def test_a_pooled_head_needs_a_pooler_type(branch: str, head: str, heads: str) -> None:
    cfg = fpn_config()
    cfg.MODEL.ROI_HEADS.NAME = heads
    for other in BRANCHES:
        cfg.MODEL[f"ROI_{other}_HEAD"].POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL[f"ROI_{branch}_HEAD"].update(NAME=head, POOLER_TYPE="")
    with pytest.raises(ValueError, match=rf"ROI_{branch}_HEAD.POOLER_TYPE is ''.*{head}.*ROIAlign"):
        build_roi_heads(cfg, FPN)


@ROI_KEYPOINT_HEAD_REGISTRY.register()
@ROI_MASK_HEAD_REGISTRY.register()
class UnpooledHead(nn.Module):
    """Takes whole feature maps, as PointRend's heads do."""

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        self.shapes = {name: shape.channels for name, shape in input_shape.items()}
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, features: dict[str, Tensor], instances: list[Instances]) -> object:
        self.seen.append(features)
        return {"loss_unpooled": self.weight} if self.training else instances


@pytest.mark.parametrize("branch", ["MASK", "KEYPOINT"])
def test_an_empty_pooler_type_leaves_the_branch_without_a_pooler(
    branch: str, ground_truth: Make
) -> None:
    cfg = fpn_config()
    cfg.MODEL[f"ROI_{branch}_HEAD"].update(NAME="UnpooledHead", POOLER_TYPE="")
    heads = build_roi_heads(cfg, FPN)
    head = getattr(heads, f"{branch.lower()}_head")
    assert getattr(heads, f"{branch.lower()}_pooler") is None
    assert isinstance(heads.box_pooler, RoIPooler)
    assert head.shapes == dict.fromkeys(FPN, 8)
    features = features_of(FPN, 1)
    assert "loss_unpooled" in train(heads, features, [ground_truth(3)])
    heads.eval()
    with torch.no_grad():
        heads(None, features, proposals_near([ground_truth(3)]))
    for seen in head.seen:
        assert seen.keys() == features.keys()
        assert all(seen[name] is features[name] for name in seen)
    assert len(head.seen) == 2


@pytest.mark.parametrize("heads", [fpn_config, c4_config])
@pytest.mark.parametrize("pooler_type", ["", "RoICrop"])
def test_unknown_pooler_type(heads: Callable[[], CfgNode], pooler_type: str) -> None:
    """The box branch needs a pooler, so that none is unknown as well."""
    cfg = heads()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = pooler_type
    named = rf"MODEL.ROI_BOX_HEAD.POOLER_TYPE is '{pooler_type}'.*RoIAlign.*RoIPool"
    with pytest.raises(ValueError, match=named):
        build_roi_heads(cfg, FPN if cfg.MODEL.KEYPOINT_ON else C4)


def test_heads_are_detectron2s_by_type() -> None:
    assert issubclass(MaskRCNNROIHeads, StandardROIHeads)
    assert issubclass(MaskRCNNC4ROIHeads, Res5ROIHeads)


def test_c5_config_trains_and_detects(ground_truth: Make) -> None:
    model_config = LazyConfig.load(str(CONFIG_DIR / "common" / "models" / "c5.py")).model
    model_config.backbone.name = "ResNet-18-C5"
    model_config.roi_heads.box_head.fc_dims = [16, 16]
    model_config.roi_heads.mask_head.conv_dims = [8, 8]
    model_config.roi_heads.batch_size_per_image = 16
    model_config.proposal_generator.post_nms_topk = (50, 20)
    model = instantiate(model_config)
    assert set(model.backbone.output_shape()) == {"res5"}
    image = torch.randint(0, 256, (3, *IMAGE), dtype=torch.uint8)
    torch.manual_seed(0)
    with EventStorage():
        losses = model([{"image": image, "instances": ground_truth(3)}])
    assert set(losses) == {
        "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"
    }  # fmt: skip
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    assert model.backbone.res5[1].conv2.weight.grad.abs().max() > 0
    model.eval()
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        (result,) = model([{"image": image}])
    instances = result["instances"]
    assert len(instances) > 0
    assert instances.pred_masks[0].shape == IMAGE
