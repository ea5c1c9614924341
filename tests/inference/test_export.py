"""Traces and scripts, by detectron2's own export, on images unlike the first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config, optimize_for_inference
from mask_rcnn_plugin.fast.winograd import use_winograd
from mask_rcnn_plugin.modeling import (
    MaskRCNNFCNHead,
    MaskRCNNKeypointHead,
    MaskRCNNMLPHead,
    RoIPooler,
)

Check = Callable[..., None]

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

MODELS = {
    "FPN": ("table4_keypoints/keypoint_and_mask", {}),
    "C4": ("table2c_roi_layer/roiwarp_max", {}),
    "C5": ("table2d_stride32/roipool", {"loss_type": "softmax"}),
    "MLP": ("table2e_mask_branch/mlp_2fc", {"loss_type": "softmax", "num_classes": 1}),
    "optimised": ("table4_keypoints/keypoint_and_mask", {}),
}
SIZES = [(96, 128), (64, 160), (130, 100), (48, 48)]


def images() -> list[Tensor]:
    """Of several sizes, float (3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.rand(1, 3, 6, 8, generator=generator) * 255 for _ in SIZES]
    return [
        nn.functional.interpolate(c, size, mode="bilinear")[0] for c, size in zip(coarse, SIZES)
    ]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A narrow model, with weights as if trained."""
    config, changes = MODELS[request.param]
    cfg = get_config(f"{config}+synthetic").model
    cfg.mask_format = "bitmap"
    cfg.backbone.update(norm="FrozenBN", width=8)
    cfg.backbone.name = cfg.backbone.name.replace("18", "10")
    cfg.roi_heads.mask_head.update(changes)
    cfg.roi_heads.box_predictor.test_topk_per_image = 12
    # TorchScript takes lists, not OmegaConf's.
    built = instantiate(OmegaConf.to_container(cfg, resolve=True)).eval()
    draw_like_trained(built, [{"image": image} for image in images()], num_candidates=100)
    return optimize_for_inference(built) if request.param == "optimised" else built


def infer(model: nn.Module, image: Tensor, postprocess: bool = True) -> Instances:
    with torch.no_grad():
        (result,) = model.inference([{"image": image}], do_postprocess=postprocess)
    return result["instances"] if postprocess else result


def assert_same(got: Instances, expected: Instances, assert_near: Check) -> None:
    fields = expected.get_fields()
    assert len(got) == len(expected)
    for name, value in fields.items():
        theirs, ours = (getattr(v, "tensor", v) for v in (value, getattr(got, name)))
        assert ours.shape == theirs.shape
        if theirs.dtype == torch.bool:
            assert (ours != theirs).sum() <= 1e-4 * theirs.numel()
        else:
            assert_near(ours, theirs, name, least=1, tolerance=1e-3)


def trace(model: nn.Module, inputs: Any, run: Callable[..., Any] | None = None) -> Callable:
    """A function of rich inputs that runs the trace of `model` on `inputs`."""
    adapter = TracingAdapter(model, inputs, run)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    return adapter._create_wrapper(traced)


def test_a_trace_answers_on_other_images(model: nn.Module, assert_near: Check) -> None:
    # The threshold is so high that one image has no detection.
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    best = [(infer(model, image).scores.max().item(), image) for image in images()]
    best.sort(key=lambda pair: -pair[0])
    model.roi_heads.box_predictor.test_score_thresh = (best[-2][0] + best[-1][0]) / 2
    several = [image for _, image in best]
    run = trace(model, [{"image": several[0]}], lambda m, x: infer(m, x[0]["image"]))
    counts = []
    for image in several:
        expected = infer(model, image)
        counts.append(len(expected))
        assert_same(run([{"image": image}]), expected, assert_near)
    assert len(set(counts)) > 2
    assert counts[-1] == 0


def test_a_script_answers_on_a_batch(
    model: nn.Module,
    stock_meta_arch: Callable[[nn.Module], Any],
    scripted_fields: dict[str, type],
    assert_near: Check,
) -> None:
    batch = [{"image": image} for image in images()[:2]]
    stock = stock_meta_arch(model)
    with torch.no_grad():
        expected = stock.inference(batch, do_postprocess=False)
        scripted = scripting_with_instances(stock, scripted_fields)
        results = scripted.inference(batch, do_postprocess=False)
    fields = expected[0].get_fields()
    for got, i in zip(results, expected, strict=True):
        as_instances = Instances(i.image_size, **{name: getattr(got, name) for name in fields})
        assert_same(as_instances, i, assert_near)
    assert min(len(i) for i in expected) > 2


HEADS = {
    "fcn": lambda **kwargs: MaskRCNNFCNHead(SHAPE, conv_dims=[4, 4], **kwargs),
    "mlp": lambda **kwargs: MaskRCNNMLPHead(SHAPE, fc_dims=[8], mask_side=14, **kwargs),
}
SHAPE = ShapeSpec(channels=6, height=7, width=7)


def detections(*classes: int) -> list[Instances]:
    boxes = torch.tensor([[3.0, 5, 31, 40]]).repeat(len(classes), 1)
    labels = torch.tensor(classes, dtype=torch.int64)
    return [Instances((96, 128), pred_boxes=Boxes(boxes), pred_classes=labels)]


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_trace_of_a_mask_head_takes_other_classes(
    make: str, loss_type: str, num_classes: int, redraw: Check, assert_near: Check
) -> None:
    head = HEADS[make](num_classes=num_classes, loss_type=loss_type).eval()
    redraw(head)
    run = trace(head, (torch.randn(2, 6, 7, 7), detections(0, 0)))
    for classes in ([0, 0], [2, 0, 1, 2], [1], []):
        classes = [c % num_classes for c in classes]
        x = torch.randn(len(classes), 6, 7, 7)
        (expected,) = head(x, detections(*classes))
        (got,) = run(x, detections(*classes))
        assert_same(got, expected, assert_near)
        assert got.pred_masks.shape == (len(classes), 1, 14, 14)


def test_a_trace_of_the_keypoint_head_takes_other_numbers(
    redraw: Check, assert_near: Check
) -> None:
    head = MaskRCNNKeypointHead(SHAPE, num_keypoints=3, conv_dims=(4,)).eval()
    redraw(head)
    run = trace(head, (torch.randn(2, 6, 7, 7), detections(0, 0)))
    for count in (2, 3, 0):
        x = torch.randn(count, 6, 7, 7)
        (expected,), (got,) = head(x, detections(*[0] * count)), run(x, detections(*[0] * count))
        assert_same(got, expected, assert_near)


LAYERS = [("RoIAlign", "ave"), ("RoIAlign", "max"), ("RoIWarp", "ave"), ("RoIPool", "max")]


@pytest.mark.parametrize(("name", "aggregation"), LAYERS)
@pytest.mark.parametrize("scales", [[1 / 8], [1 / 4, 1 / 8]])
def test_poolers_take_other_boxes(
    name: str, aggregation: str, scales: list[float], assert_near: Check
) -> None:
    pooler = RoIPooler(3, scales, 2, name, 32, 3, aggregation=aggregation)

    def inputs(size: int, *counts: int) -> tuple[list[Tensor], list[Boxes]]:
        corners = [torch.rand(n, 2, 2) * size for n in counts]
        boxes = [Boxes(torch.cat([c.amin(1), c.amax(1)], dim=1)) for c in corners]
        maps = [torch.randn(len(counts), 2, round(size * s), round(size * s)) for s in scales]
        return maps, boxes

    run = trace(pooler, inputs(64, 3, 2))
    scripted = torch.jit.script(pooler)
    assert isinstance(scripted, torch.jit.ScriptModule)
    for size, counts in ((64, (2, 3)), (96, (0, 7)), (32, (0, 0))):
        x = inputs(size, *counts)
        assert_near(run(*x), pooler(*x))
        assert_near(scripted(*x), pooler(*x))


def test_half_precision_is_traced() -> None:
    pooler = RoIPooler(3, [1 / 8])
    features = torch.randn(1, 2, 8, 8).bfloat16()
    boxes = [Boxes(torch.tensor([[3.0, 5, 40, 50]]))]
    traced = trace(pooler, ([features], boxes))([features], boxes)
    expected = pooler([features.float()], boxes)
    assert traced.dtype == torch.bfloat16
    torch.testing.assert_close(traced.float(), expected, rtol=0.02, atol=0.02)


def test_an_exported_convolution_is_torchs_alone(assert_near: Check) -> None:
    conv = Conv2d(256, 256, 3, padding=1, activation=nn.ReLU()).requires_grad_(False)
    fast, x = use_winograd(conv), torch.randn(1, 256, 20, 20)
    assert type(fast) is not Conv2d
    for exported in (torch.jit.trace(fast, x), torch.jit.script(fast)):
        assert "winograd_conv" not in str(exported.inlined_graph)
        assert_near(exported(torch.cat([x, x]))[1:], conv(x))
