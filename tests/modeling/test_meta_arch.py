"""Whole models: agreement with detectron2's, output sizes, empty images, zoo checkpoints."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from mask_rcnn_plugin import add_mask_rcnn_config, get_config
from mask_rcnn_plugin.modeling import MaskRCNN, RLEMasks

Check = Callable[..., None]
Make = Callable[..., Instances]
Image = dict[str, Any]

FPN_LEVELS = ["res2", "res3", "res4", "res5"]


def zoo_config(features: str, **branches: bool) -> CfgNode:
    """The keys of detectron2's Base-RCNN-FPN.yaml or Base-RCNN-C4.yaml that shape a model."""
    cfg = get_cfg()
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.META_ARCHITECTURE = "GeneralizedRCNN"
    model.RESNETS.DEPTH = 50
    model.MASK_ON = branches.get("mask", False)
    model.KEYPOINT_ON = branches.get("keypoint", False)
    if features == "FPN":
        model.BACKBONE.NAME = "build_resnet_fpn_backbone"
        model.RESNETS.OUT_FEATURES = FPN_LEVELS
        model.FPN.IN_FEATURES = FPN_LEVELS
        model.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        model.ROI_HEADS.NAME = "StandardROIHeads"
        model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        model.ROI_BOX_HEAD.NUM_FC = 2
        model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        model.ROI_MASK_HEAD.NUM_CONV = 4
        model.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    else:
        model.ROI_HEADS.NAME = "Res5ROIHeads"
        model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    if model.KEYPOINT_ON:
        model.ROI_HEADS.NUM_CLASSES = 1
    return cfg


def small(cfg: CfgNode, num_classes: int = 3) -> CfgNode:
    """A sixteenth as wide."""
    model = cfg.MODEL
    model.PIXEL_STD = [50.0, 50.0, 50.0]
    model.RESNETS.STEM_OUT_CHANNELS = 8
    model.RESNETS.WIDTH_PER_GROUP = 4
    model.RESNETS.RES2_OUT_CHANNELS = 16
    model.FPN.OUT_CHANNELS = 16
    model.ROI_HEADS.NUM_CLASSES = num_classes
    # All that may be: which are sampled of more is left to chance.
    model.RPN.BATCH_SIZE_PER_IMAGE, model.RPN.POSITIVE_FRACTION = 10_000, 1.0
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.POSITIVE_FRACTION = 100, 1.0
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    model.ROI_BOX_HEAD.FC_DIM = 32
    model.ROI_MASK_HEAD.CONV_DIM = 8
    model.ROI_KEYPOINT_HEAD.CONV_DIMS = (8, 8)
    model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = 200, 50
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN = 200, 50
    return cfg


def ours(cfg: CfgNode, output_format: str = "rle") -> CfgNode:
    """The same model out of the plugin's parts."""
    cfg = cfg.clone()
    add_mask_rcnn_config(cfg)
    model = cfg.MODEL
    model.META_ARCHITECTURE = "MaskRCNN"
    model.BACKBONE.NAME = "build_mask_rcnn_resnet_backbone"
    model.ANCHOR_GENERATOR.NAME = "MaskRCNNAnchorGenerator"
    model.PROPOSAL_GENERATOR.NAME = "MaskRCNNRPN"
    fpn = model.ROI_HEADS.NAME == "StandardROIHeads"
    model.ROI_HEADS.NAME = "MaskRCNNROIHeads" if fpn else "MaskRCNNC4ROIHeads"
    model.ROI_MASK_HEAD.NAME = "MaskRCNNFCNHead"
    model.ROI_MASK_HEAD.OUTPUT_FORMAT = output_format
    model.ROI_KEYPOINT_HEAD.NAME = "MaskRCNNKeypointHead"
    return cfg


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "zoo"),
    [
        ("table2a_backbone/r50_fpn", zoo_config("FPN", mask=True)),
        ("table2a_backbone/r50_c4", zoo_config("C4", mask=True)),
        ("table4_keypoints/keypoint_only", zoo_config("FPN", keypoint=True)),
    ],
)
def test_zoo_checkpoints_fit(config: str, zoo: CfgNode) -> None:
    zoo = zoo.clone()
    zoo.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        theirs = shapes(build_model(zoo))
        from_lazy = shapes(instantiate(get_config(config).model))
        from_yaml = shapes(build_model(ours(zoo)))
    assert len(theirs) > 200
    assert from_lazy == theirs
    assert from_yaml == theirs


def model_pair(cfg: CfgNode, redraw: Check) -> tuple[nn.Module, nn.Module]:
    theirs, plugin = build_model(cfg), build_model(ours(cfg))
    # As large as gives detections of every class and size, and masks that are not all one.
    redraw(theirs, gain=1.0 if cfg.MODEL.KEYPOINT_ON else 0.8)
    # Residual branches add little, as in a trained network; else fifty layers blow up rounding.
    for name, value in theirs.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value.mul_(0.6)
    plugin.load_state_dict(theirs.state_dict(), strict=True)
    return plugin, theirs


@pytest.fixture(scope="module")
def cache() -> dict[str, tuple[nn.Module, nn.Module]]:
    return {}


@pytest.fixture(params=["FPN", "C4"])
def pair(
    request: pytest.FixtureRequest,
    redraw: Check,
    cache: dict[str, tuple[nn.Module, nn.Module]],
) -> tuple[nn.Module, nn.Module]:
    """Our model and detectron2's on the same weights: (ours, theirs)."""
    features = request.param
    if features not in cache:
        fpn = features == "FPN"
        cfg = small(zoo_config(features, mask=True, keypoint=fpn))
        cache[features] = model_pair(cfg, redraw)
    for model in cache[features]:
        model.train()
        model.zero_grad()
        model.roi_heads.box_predictor.test_score_thresh = 0.3
    cache[features][0].mask_format = "rle"
    return cache[features]


def image(size: tuple[int, int], seed: int = 0, **extra: object) -> Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return {"image": pixels[0].clamp(0, 255).to(torch.uint8), **extra}


def detect(model: nn.Module, batch: list[Image], **kwargs: object) -> list[Instances]:
    model.eval()
    with torch.no_grad():
        results = model.inference(batch, **kwargs) if kwargs else model(batch)
    return [r["instances"] for r in results]


BATCH = [image((96, 128), 0, height=150, width=200), image((120, 100), 1)]


def test_training_agrees(
    pair: tuple[nn.Module, nn.Module], ground_truth: Make, assert_near: Check
) -> None:
    plugin, theirs = pair
    batch = [
        image((96, 128), 0, instances=ground_truth(3)),
        image((96, 128), 1, instances=ground_truth(0)),
    ]
    losses = []
    for model in (plugin, theirs):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model(copy.deepcopy(batch)))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    assert {"loss_cls", "loss_mask", "loss_rpn_cls"} < set(losses[0])
    for name, loss in losses[0].items():
        assert_near(loss, losses[1][name], name)
    grads = [q.grad for q in theirs.parameters() if q.grad is not None]
    least = 0.1 * max(grad.abs().max() for grad in grads)  # see assert_same_training
    for (name, p), q in zip(plugin.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            error = (p.grad - q.grad).abs().max()
            assert error <= 1e-4 * max(q.grad.abs().max(), least), name


@pytest.mark.parametrize("mask_format", ["rle", "bitmap"])
def test_inference_agrees(
    pair: tuple[nn.Module, nn.Module], mask_format: str, assert_near: Check
) -> None:
    plugin, theirs = pair
    plugin.mask_format = mask_format
    results, expected = detect(plugin, BATCH), detect(theirs, BATCH)
    for i, j, size in zip(results, expected, [(150, 200), (120, 100)], strict=True):
        assert i.image_size == j.image_size == size
        assert len(i) == len(j) > 2
        assert set(i.get_fields()) == set(j.get_fields()) - {"pred_keypoint_heatmaps"}
        assert_near(i.pred_boxes.tensor, j.pred_boxes.tensor, tolerance=1e-4)
        assert_near(i.scores, j.scores, tolerance=1e-4)
        assert i.pred_classes.tolist() == j.pred_classes.tolist()
        if mask_format == "rle":
            assert isinstance(i.pred_masks, RLEMasks)
            masks = torch.stack(list(i.pred_masks))
        else:
            masks = i.pred_masks
        assert masks.dtype == torch.bool
        assert masks.shape == (len(i), *size)
        # A probability of 1/2 may fall to either side.
        assert (masks != j.pred_masks).float().mean() < 1e-4
        assert 0 < j.pred_masks.float().mean() < 1
        if j.has("pred_keypoints"):
            assert_near(i.pred_keypoints, j.pred_keypoints, tolerance=1e-4)


def test_rle_equals_bitmap(pair: tuple[nn.Module, nn.Module]) -> None:
    plugin, _ = pair
    rle = detect(plugin, BATCH)
    plugin.mask_format = "bitmap"
    for i, j in zip(rle, detect(plugin, BATCH), strict=True):
        assert torch.equal(torch.stack(list(i.pred_masks)), j.pred_masks)


def test_output_size_scales_the_detections(pair: tuple[nn.Module, nn.Module]) -> None:
    plugin, _ = pair
    same = detect(plugin, [image((96, 128))])[0]
    (twice,) = detect(plugin, [image((96, 128), height=192, width=384)])
    assert same.image_size == (96, 128)
    assert same.pred_masks[0].shape == (96, 128)
    assert twice.pred_masks[0].shape == (192, 384)
    scale = torch.tensor([3.0, 2, 3, 2])
    torch.testing.assert_close(twice.pred_boxes.tensor, same.pred_boxes.tensor * scale)
    if same.has("pred_keypoints"):
        scaled = same.pred_keypoints * torch.tensor([3.0, 2, 1])
        torch.testing.assert_close(twice.pred_keypoints, scaled)


def test_without_postprocessing_masks_stay_soft(pair: tuple[nn.Module, nn.Module]) -> None:
    plugin, _ = pair
    plugin.eval()
    with torch.no_grad():
        results = plugin.inference(BATCH, do_postprocess=False)
    for i, size in zip(results, [(96, 128), (120, 100)], strict=True):
        assert i.image_size == size
        assert i.pred_masks.shape[:2] == (len(i), 1)
        assert i.pred_masks.is_floating_point()


def test_given_boxes_skip_the_box_branch(
    pair: tuple[nn.Module, nn.Module], assert_near: Check
) -> None:
    plugin, theirs = pair

    def given() -> list[Instances]:
        boxes = torch.tensor([[10.0, 10, 60, 70], [20, 5, 90, 60]])
        return [
            Instances(size, pred_boxes=Boxes(boxes.clone()), pred_classes=torch.tensor([2, 0]))
            for size in [(96, 128), (120, 100)]
        ]

    results = detect(plugin, BATCH, detected_instances=given())
    expected = detect(theirs, BATCH, detected_instances=given())
    for i, j in zip(results, expected, strict=True):
        assert_near(i.pred_boxes.tensor, j.pred_boxes.tensor)
        assert (torch.stack(list(i.pred_masks)) != j.pred_masks).float().mean() < 1e-4


def test_detections_without_area_are_dropped(pair: tuple[nn.Module, nn.Module]) -> None:
    plugin, _ = pair
    boxes = torch.tensor([[10.0, 10, 60, 70], [20, 5, 20, 60], [30, 8, 90, 90]])
    given = Instances((96, 128), pred_boxes=Boxes(boxes), pred_classes=torch.tensor([2, 0, 1]))
    alone = Instances(
        (96, 128), pred_boxes=Boxes(boxes[2:].clone()), pred_classes=torch.tensor([1])
    )
    (result,) = detect(plugin, [image((96, 128))], detected_instances=[given])
    (expected,) = detect(plugin, [image((96, 128))], detected_instances=[alone])
    assert result.pred_classes.tolist() == [2, 1]
    assert len(result.pred_masks) == 2
    assert result.pred_masks[1].any()
    assert (result.pred_masks[1] != expected.pred_masks[0]).float().mean() < 1e-3


def test_no_detection(pair: tuple[nn.Module, nn.Module]) -> None:
    plugin, _ = pair
    plugin.roi_heads.box_predictor.test_score_thresh = 1.0
    for mask_format in ("rle", "bitmap"):
        plugin.mask_format = mask_format
        for i, size in zip(detect(plugin, BATCH), [(150, 200), (120, 100)], strict=True):
            assert len(i) == 0
            assert i.image_size == size
            assert i.pred_masks.shape == (0, *size)
            assert isinstance(i.pred_masks, RLEMasks) == (mask_format == "rle")
            if i.has("pred_keypoints"):
                assert i.pred_keypoints.shape == (0, 3, 3)


# detectron2 logs the mean number of positives over the images that have any.
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_training_without_objects(pair: tuple[nn.Module, nn.Module], ground_truth: Make) -> None:
    plugin, _ = pair
    batch = [image((96, 128), seed, instances=ground_truth(0)) for seed in (0, 1)]
    with EventStorage():
        losses = plugin(batch)
    branches = [n for n in ("loss_mask", "loss_keypoint", "loss_box_reg") if n in losses]
    assert "loss_mask" in branches
    assert all(losses[name].item() == 0 for name in branches)
    sum(losses.values()).backward()
    for name, p in plugin.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("branch", ["neither", "keypoint"])
@pytest.mark.parametrize("mask_format", ["rle", "bitmap"])
def test_models_without_masks(branch: str, mask_format: str, redraw: Check) -> None:
    cfg = small(zoo_config("FPN", keypoint=branch == "keypoint"), 1)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(ours(cfg, mask_format))
    redraw(model, gain=1.0)
    (instances,) = detect(model, [image((96, 128), height=48, width=64)])
    assert instances.image_size == (48, 64)
    assert len(instances) > 0
    assert not instances.has("pred_masks")
    assert instances.has("pred_keypoints") == (branch == "keypoint")


@pytest.mark.parametrize("mask_format", ["rle", "bitmap"])
def test_flops_are_counted(
    pair: tuple[nn.Module, nn.Module],
    mask_format: str,
    stock_meta_arch: Callable[[nn.Module], nn.Module],
) -> None:
    plugin, _ = pair
    plugin.mask_format = mask_format
    counts = []
    for model in (plugin.eval(), stock_meta_arch(plugin)):
        flops = FlopCountAnalysis(model, [image((96, 128), height=48, width=64)])
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts.append(flops.by_operator())
    assert counts[0] == counts[1]
    assert counts[0]["conv"] > 1e6


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_gives_bitmaps(pair: tuple[nn.Module, nn.Module]) -> None:
    plugin, _ = pair
    batch = [image((96, 128))]
    (expected,) = detect(plugin, batch)
    adapter = TracingAdapter(plugin, batch)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    (result,) = adapter.outputs_schema(traced(*adapter.flattened_inputs))
    masks = result["instances"].pred_masks
    assert type(masks) is Tensor
    assert len(masks) > 2
    assert torch.equal(masks, expected.pred_masks)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripts_where_detectron2_does(scripted_fields: dict[str, type]) -> None:
    """Over stock parts, so that only the meta-architecture is in question."""
    cfg = small(zoo_config("FPN", mask=True))
    add_mask_rcnn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "MaskRCNN"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    for mask_format in ("bitmap", "rle"):
        cfg.MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT = mask_format
        model = build_model(cfg).eval()
        batch = [{"image": image((96, 128))["image"].float()}]
        with torch.no_grad():
            (expected,) = model.inference(batch, do_postprocess=False)
            scripted = scripting_with_instances(SoftMasks(model).eval(), scripted_fields)
            (result,) = scripted(batch)
        assert len(expected) > 2
        assert torch.equal(result.pred_masks, expected.pred_masks)


class SoftMasks(nn.Module):
    """What detectron2 scripts: an R-CNN without its post-processing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: list[dict[str, Tensor]]) -> list[Instances]:
        return self.model.inference(batch, do_postprocess=False)


def test_masks_are_detectron2s_unless_asked_for() -> None:
    yaml = zoo_config("FPN", mask=True)
    add_mask_rcnn_config(yaml)
    yaml.MODEL.META_ARCHITECTURE, yaml.MODEL.DEVICE = "MaskRCNN", "meta"
    lazy = get_config("table2a_backbone/r50_fpn").model
    with torch.device("meta"):
        assert instantiate(lazy).mask_format == "rle"
        del lazy.mask_format
        assert instantiate(lazy).mask_format == "bitmap"
        assert build_model(yaml).mask_format == "bitmap"


@pytest.mark.parametrize("mask_format", ["rle", "bitmap"])
def test_both_front_ends_choose_the_mask_format(mask_format: str) -> None:
    lazy = get_config("table2a_backbone/r50_fpn", [f"model.mask_format={mask_format}"]).model
    zoo = zoo_config("FPN", mask=True)
    zoo.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        assert instantiate(lazy).mask_format == mask_format
        assert build_model(ours(zoo, mask_format)).mask_format == mask_format


def test_unknown_mask_format() -> None:
    message = "mask_format is 'polygon', must be one of"
    lazy = get_config("table2a_backbone/r50_fpn", ["model.mask_format=polygon"]).model
    yaml = ours(small(zoo_config("FPN", mask=True)), "polygon")
    with torch.device("meta"):
        with pytest.raises(ValueError, match=message):
            instantiate(lazy)
        with pytest.raises(ValueError, match=message):
            build_model(yaml)


@pytest.mark.parametrize("config", ["table2a_backbone/r50_fpn", "table2a_backbone/r50_c4"])
def test_lazy_config_model_trains_and_detects(config: str, ground_truth: Make) -> None:
    features = "C4" if config.endswith("c4") else "FPN"
    overrides = [
        f"model.backbone.name=ResNet-18-{features}",
        "model.roi_heads.num_classes=3",
        "model.roi_heads.batch_size_per_image=16",
        f"model.roi_heads.mask_head.conv_dims={[8] if features == 'C4' else [8, 8]}",
        "model.proposal_generator.post_nms_topk=[50,20]",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
    ]
    if features == "FPN":
        overrides += ["model.backbone.fpn_channels=16", "model.roi_heads.box_head.fc_dims=[16,16]"]
    model = instantiate(get_config(config, overrides).model)
    assert type(model) is MaskRCNN
    torch.manual_seed(0)
    with EventStorage():
        losses = model([image((96, 128), 0, instances=ground_truth(3))])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.roi_heads.mask_head.predictor.weight.grad.ne(0).any()
    (instances,) = detect(model, [image((96, 128))])
    assert 0 < len(instances) <= 100
    assert instances.pred_masks[0].shape == (96, 128)
