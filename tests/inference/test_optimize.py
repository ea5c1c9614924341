"""`optimize_for_inference`: the same answers, from detectron2's models and the plugin's."""

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances, pairwise_iou
from torch import nn

from benchmark.cuda_rules import CudaRules
from benchmark.peers import stock_detectron2
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config, optimize_for_inference
from mask_rcnn_plugin.modeling import RoIPooler

Check = Callable[..., None]

SIZE = (96, 128)
CONVS = (nn.Conv2d, nn.ConvTranspose2d)


def image(size: tuple[int, int] = SIZE) -> dict[str, torch.Tensor]:
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return {"image": pixels[0].clamp(0, 255).to(torch.uint8)}


@functools.cache
def build(config: str, sampling_ratio: int = 2) -> tuple[nn.Module, nn.Module]:
    """The plugin's model of a config and detectron2's, small."""
    cfg = get_config(f"{config}+synthetic").model
    cfg.backbone.norm = "FrozenBN"
    cfg.backbone.name = cfg.backbone.name.replace("18", "10")
    cfg.roi_heads.num_classes = 5
    for name, part in cfg.roi_heads.items():
        if name.endswith("pooler"):
            part.sampling_ratio = sampling_ratio
    stock, plugin = stock_detectron2(cfg), instantiate(cfg)
    draw_like_trained(stock, [image()], num_candidates=30)
    plugin.load_state_dict(stock.state_dict(), strict=True)
    thresh = stock.roi_heads.box_predictor.test_score_thresh
    plugin.roi_heads.box_predictor.test_score_thresh = thresh
    return plugin.eval(), stock.eval()


def plugins(config: str) -> nn.Module:
    return copy.deepcopy(build(config)[0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    # With adaptive sampling, as in its zoo.
    "detectron2": lambda: copy.deepcopy(build("table4_keypoints/keypoint_and_mask", 0)[1]),
    "FPN": lambda: plugins("table4_keypoints/keypoint_and_mask"),
    "C4": lambda: plugins("table2a_backbone/r50_c4"),
    "MLP": lambda: plugins("table2e_mask_branch/mlp_2fc"),
}


def detect(model: nn.Module, size: tuple[int, int] = SIZE) -> Instances:
    with torch.no_grad():
        return model([image(size)])[0]["instances"]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_same(name: str, channels_last: bool, assert_near: Check) -> None:
    model = MODELS[name]()
    expected = detect(model)
    fast = optimize_for_inference(model, channels_last=channels_last)
    result = detect(fast)
    assert len(result) == len(expected) > 2
    assert result.pred_classes.tolist() == expected.pred_classes.tolist()
    assert_near(result.pred_boxes.tensor, expected.pred_boxes.tensor, tolerance=1e-4)
    assert_near(result.scores, expected.scores, tolerance=1e-4)
    masks, expected_masks = (torch.stack(list(r.pred_masks)) for r in (result, expected))
    assert expected_masks.any()
    assert (masks != expected_masks).float().mean() < 1e-4
    if expected.has("pred_keypoints"):
        assert_near(result.pred_keypoints, expected.pred_keypoints, tolerance=1e-4)
    convs = [m for m in fast.modules() if isinstance(m, CONVS) and max(m.kernel_size) > 1]
    assert len(convs) > 10
    if channels_last:
        assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convs)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_to_fold_and_the_model_is_as_it_was(name: str) -> None:
    model = MODELS[name]().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    norms = (FrozenBatchNorm2d, nn.BatchNorm2d)
    assert any(isinstance(m, norms) for m in model.modules())
    assert not any(isinstance(m, norms) for m in fast.modules())
    assert not any(m.training for m in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
        assert after[key].dtype == value.dtype


@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_stay_channels_last_up_to_the_heads(name: str) -> None:
    model = optimize_for_inference(MODELS[name]())
    seen = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        layout = args[0].is_contiguous(memory_format=torch.channels_last)
        seen.append((layout, tuple(args[0].shape)))

    for module in model.modules():
        if isinstance(module, CONVS) and module.in_channels > 3:  # the image comes as it is
            module.register_forward_pre_hook(look)
    detect(model)
    assert len(seen) > 12
    assert all(layout for layout, _ in seen), [shape for layout, shape in seen if not layout]


def test_detectron2s_roi_align_is_replaced_and_nothing_else() -> None:
    model = MODELS["detectron2"]()
    fast = optimize_for_inference(model)
    assert type(model.roi_heads.box_pooler) is ROIPooler
    assert type(fast.roi_heads.box_pooler) is RoIPooler
    model.roi_heads.box_pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIPool")
    assert type(optimize_for_inference(model).roi_heads.box_pooler) is ROIPooler


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_finds_the_same(name: str) -> None:
    model = MODELS[name]()
    expected = detect(model)
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    assert fast.backbone(torch.zeros(1, 3, 64, 64)).popitem()[1].dtype == torch.bfloat16
    result = detect(fast)
    for field in ("scores", "pred_boxes", "pred_masks", "pred_keypoints"):
        assert result.has(field) == expected.has(field)
    assert result.scores.dtype == result.pred_boxes.tensor.dtype == torch.float32
    same_class = result.pred_classes[:, None] == expected.pred_classes
    iou = pairwise_iou(result.pred_boxes, expected.pred_boxes) * same_class
    # Random weights blow rounding up; a trained network's boxes are compared by the benchmark.
    assert (iou.amax(dim=0) > 0.8).float().mean() > 0.6


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float64, must be None or one of"):
        optimize_for_inference(MODELS["detectron2"](), dtype=torch.float64)


def test_compiled(monkeypatch: pytest.MonkeyPatch, assert_near: Check) -> None:
    # The graph is ours, its code torch's: generating it takes half a minute and a C++ compiler.
    without_code = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", without_code)
    model = MODELS["detectron2"]()
    fast = optimize_for_inference(model, compile=True)
    for size in (SIZE, (64, 160)):
        expected, result = detect(model, size), detect(fast, size)
        assert len(result) == len(expected) > 0
        assert_near(result.pred_boxes.tensor, expected.pred_boxes.tensor, tolerance=1e-3)


def test_norms_that_are_synchronised_in_training_are_folded() -> None:
    cfg = get_config("table2a_backbone/r50_fpn+synthetic").model
    cfg.backbone.norm = "SyncBN"
    model = instantiate(cfg)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    fast = optimize_for_inference(model)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in fast.modules())


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16 for a Wrapper"),
        ({"compile": True}, "compile is True, but a Wrapper has no backbone"),
    ],
)
def test_a_model_that_an_option_is_not_for_is_refused(
    arguments: dict[str, object], message: str
) -> None:
    wrapped = Wrapper(MODELS["C4"]())
    assert not any(
        isinstance(m, FrozenBatchNorm2d) for m in optimize_for_inference(wrapped).modules()
    )
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(wrapped, **arguments)


def test_an_optimised_model_is_saved_and_copied(assert_near: Check) -> None:
    fast = optimize_for_inference(MODELS["FPN"](), dtype=torch.bfloat16)
    again = pickle.loads(pickle.dumps(fast))
    assert_near(detect(again).pred_boxes.tensor, detect(fast).pred_boxes.tensor)
    assert_near(detect(copy.deepcopy(fast)).scores, detect(fast).scores)


def test_a_retinanet(assert_near: Check) -> None:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.PIXEL_STD = [50.0] * 3
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for block in model.backbone.bottom_up.modules():  # else activations double at each
        if hasattr(block, "conv3"):
            block.conv3.norm.weight.fill_(0.2)
    expected, result = detect(model), detect(optimize_for_inference(model))
    assert len(result) == len(expected) > 0
    assert_near(result.scores, expected.scores, tolerance=1e-4)
    with pytest.raises(ValueError, match="for a RetinaNet"):
        optimize_for_inference(model, dtype=torch.bfloat16)


def test_the_layout_on_cuda_is_left_until_it_is_measured() -> None:
    with CudaRules():
        layers = nn.Sequential(Conv2d(8, 8, 3)).to("cuda")
        assert not optimize_for_inference(layers)[0].weight.is_contiguous(
            memory_format=torch.channels_last
        )
    layers = nn.Sequential(Conv2d(8, 8, 3))
    assert optimize_for_inference(layers)[0].weight.is_contiguous(memory_format=torch.channels_last)
