"""timm's models as backbones: parity, freezing, training, inference, errors."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.export import TracingAdapter
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.utils.events import EventStorage
from torch import nn

from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import add_mask_rcnn_config, get_config, optimize_for_inference
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.modeling import resnet_backbone, timm_backbone, timm_normalization
from mask_rcnn_plugin.training import setup_datasets

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

Check = Callable[..., None]
LEVELS = ["res2", "res3", "res4", "res5"]
SWIN = "swin_tiny_patch4_window7_224"


def alone(name: str, **kwargs: Any) -> nn.Module:
    return timm_backbone(name, fpn_channels=None, **kwargs)


def as_detectron2_calls(key: str) -> str:
    """The name of a ResNet's weight in detectron2, from timm's."""
    layer, _, rest = key.partition(".")
    stage = f"res{int(layer[5:]) + 1}.{rest}" if layer.startswith("layer") else f"stem.{key}"
    stage = stage.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for n in "123":
        stage = stage.replace(f"bn{n}", f"conv{n}.norm")
    return stage


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_timms_resnet_50_is_detectron2s(norm: str, redraw: Check, assert_near: Check) -> None:
    blocks = ResNet.make_default_stages(50, norm=norm, stride_in_1x1=False)
    theirs = ResNet(BasicStem(norm=norm), blocks, out_features=LEVELS, freeze_at=2)
    redraw(theirs, gain=1.0)
    ours = alone("resnet50", norm=norm)
    weights = theirs.state_dict()
    names = {key: as_detectron2_calls(key) for key in ours.features.state_dict()}
    known = {key: weights[name] for key, name in names.items() if name in weights}
    assert {names[key] for key in known} == set(weights)
    ours.features.load_state_dict(known, strict=False)  # frozen batch norm counts no batches
    assert {k: (s.channels, s.stride) for k, s in ours.output_shape().items()} == {
        k: (s.channels, s.stride) for k, s in theirs.output_shape().items()
    }
    x = torch.randn(2, 3, 64, 96).double()  # where fifty layers blow up no rounding
    maps, expected = ours.double().train()(x), theirs.double().train()(x)
    assert list(maps) == LEVELS
    for name in LEVELS:
        assert_near(maps[name], expected[name], name)
    sum((m * m).mean() for m in maps.values()).backward()
    sum((m * m).mean() for m in expected.values()).backward()
    parameters = dict(theirs.named_parameters())
    for key, p in ours.features.named_parameters():
        q = parameters.pop(names[key])
        assert p.requires_grad == q.requires_grad, key
        assert (p.grad is None) == (q.grad is None), key
        if q.grad is not None:
            assert_near(p.grad, q.grad, key)
    assert not parameters
    if norm == "BN":  # the frozen stages' statistics stay, the others' move alike
        for key, value in ours.features.state_dict().items():
            if key.endswith("running_mean"):
                assert_near(value, theirs.state_dict()[names[key]], key)
                is_kept = torch.equal(value, known[key].double())
                assert is_kept == key.startswith(("bn1", "layer1")), key


@pytest.mark.parametrize(
    ("name", "freeze_at", "first_free"),
    [
        ("resnet10t", 0, "conv1.0.weight"),
        ("resnet10t", 1, "layer1.0.conv1.weight"),
        ("resnet10t", 3, "layer3.0.conv1.weight"),
        ("convnext_atto", 1, "stages_0.blocks.0.gamma"),
        ("convnext_atto", 2, "stages_1.downsample.0.weight"),
        ("tf_efficientnet_lite0", 1, "blocks.1.0.conv_pw.weight"),
        ("tf_efficientnet_lite0", 2, "blocks.2.0.conv_pw.weight"),
        ("pvt_v2_b0", 2, "stages_1.downsample.proj.weight"),
        ("tresnet_m", 1, "body_layer1.0.conv1.conv.weight"),
        ("sam2_hiera_tiny", 2, "model.blocks.1.proj.weight"),
    ],
)
def test_stem_and_first_stages_are_frozen(name: str, freeze_at: int, first_free: str) -> None:
    with torch.device("meta"):
        features = alone(name, freeze_at=freeze_at).features
    names = [key for key, _ in features.named_parameters()]
    free = [key for key, p in features.named_parameters() if p.requires_grad]
    assert free == names[names.index(first_free) :]


def test_frozen_batch_norm_keeps_timms_activation(redraw: Check, assert_near: Check) -> None:
    plain = timm.create_model(
        "tf_efficientnet_lite0", features_only=True, out_indices=(1, 2)
    ).eval()
    redraw(plain)
    frozen = alone("tf_efficientnet_lite0", out_features=["res2", "res3"])
    frozen.features.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(frozen.train()(x).values(), plain(x), strict=True):
        assert_near(ours, theirs)
    assert not any("bn" in key for key, _ in frozen.named_parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


def test_batch_norm_of_several_processes() -> None:
    with torch.device("meta"):
        features = alone("regnetx_002", norm="SyncBN").features
    synced = {key for key, m in features.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert {key.split(".")[0] for key in synced} == {"s2", "s3", "s4"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in features.modules())


def test_stages_are_those_of_their_strides() -> None:
    """VGG's list begins at stride 1, ConvNeXt's at 4, most others' at 2."""
    x = torch.zeros(1, 3, 64, 96)
    for name in ("vgg11_bn", "convnext_atto", "resnet10t"):
        backbone = alone(name, freeze_at=0, out_features=["res5", "res3"])
        assert list(backbone.output_shape()) == ["res3", "res5"]
        assert backbone.size_divisibility == 32
        for stage, value in backbone(x).items():
            shape = backbone.output_shape()[stage]
            assert value.shape[1:] == (shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_what_follows_the_last_stage_is_left_out() -> None:
    with torch.device("meta"):
        features = alone("resnet10t", out_features=["res4"]).features
    assert "layer3" in features
    assert "layer4" not in features


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("resnet10t", {}),
    "ConvNeXt": ("convnext_atto", {}),
    "Swin": (SWIN, {"embed_dim": 24, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 4, 8]}),
    "MobileNet": ("mobilenetv3_small_050", {}),
    "RegNet": ("regnetx_002", {}),
}


def small_config(family: str, data: Path) -> Any:
    name, options = FAMILIES[family]
    cfg = get_config(
        "backbones/convnext_tiny+ablation",
        [
            f"model.backbone.name={name}",
            *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
            f"dataset.synthetic.root={data}",
            "dataloader.train.total_batch_size=2",
            "train.device=cpu",
        ],
    )
    cfg.model.backbone.options = options
    cfg.model.mask_format = "bitmap"
    setup_datasets(cfg)
    return cfg


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_is_optimized_and_traced(
    family: str, toy_dataset: Path, assert_near: Check
) -> None:
    cfg = small_config(family, toy_dataset)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    totals = []
    with EventStorage():
        for _ in range(20):
            total = sum(model(batch).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert sum(totals[-4:]) < 0.95 * sum(totals[:4])

    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 128, generator=generator) * 255 for _ in range(2)]
    draw_like_trained(model.eval(), [{"image": image} for image in images], num_candidates=60)
    inputs = [{"image": images[1]}]
    fast = optimize_for_inference(model)
    adapter = TracingAdapter(fast, [{"image": images[0]}], lambda m, x: m.inference(x)[0])
    with torch.no_grad():
        (expected,), (got,) = model(inputs), fast(inputs)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        outputs = adapter.outputs_schema(traced(images[1]))
    expected = expected["instances"]
    assert len(expected) > 3
    for result in (got["instances"], outputs["instances"]):
        assert_near(result.scores, expected.scores, tolerance=1e-3)
        assert_near(result.pred_boxes.tensor, expected.pred_boxes.tensor, tolerance=1e-3)
        assert (result.pred_masks != expected.pred_masks).float().mean() < 1e-3


def test_a_transformer_takes_images_of_any_size() -> None:
    backbone = timm_backbone(SWIN, options=FAMILIES["Swin"][1], fpn_channels=8)
    for size in ((64, 96), (192, 32)):
        maps = backbone(torch.zeros(1, 3, *size))
        assert [tuple(m.shape[1:]) for m in maps.values()] == [
            (8, size[0] // s, -(-size[1] // s)) for s in (4, 8, 16, 32, 64)
        ]


def test_a_map_with_channels_last_is_turned() -> None:
    backbone = alone(SWIN, freeze_at=0, options=FAMILIES["Swin"][1]).eval()
    x = torch.randn(1, 3, 224, 224)
    for ours, theirs in zip(backbone(x).values(), backbone.features(x), strict=True):
        assert torch.equal(ours.permute(0, 2, 3, 1), theirs)


def test_images_are_normalised_as_timm_does() -> None:
    pixels = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    for name in ("tf_efficientnet_lite0.in1k", "convnext_tiny.fb_in1k"):
        config = timm.models.get_pretrained_cfg(name)
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
        ours = [torch.tensor(timm_normalization(name, k))[:, None, None] for k in ("mean", "std")]
        torch.testing.assert_close((pixels - ours[0]) / ours[1], (pixels / 255 - mean) / std)
    cfg = get_config("backbones/efficientnet_lite0")
    assert cfg.dataloader.train.mapper.image_format == cfg.model.input_format == "RGB"
    assert instantiate(cfg.model.pixel_mean) == instantiate(cfg.model.pixel_std) == [127.5] * 3
    cfg = get_config("backbones/efficientnet_lite0", ["model.backbone.name=resnet10t"])
    assert instantiate(cfg.model.pixel_mean) == pytest.approx([123.675, 116.28, 103.53])


def yaml_config(*changes: Any) -> CfgNode:
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_mask_rcnn_timm_backbone"
    cfg.MODEL.BACKBONE.TIMM_NAME = "resnet10t"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = LEVELS
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.68, 116.28, 103.53], [58.4, 57.12, 57.38]
    cfg.merge_from_list(list(changes))
    return cfg


def test_yaml_gives_the_same_backbone() -> None:
    for changes, kwargs in (
        ([], {}),
        (
            ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.FPN.NORM", "GN"],
            {"fpn_channels": 32, "fpn_norm": "GN"},
        ),
        (
            ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"],
            {"freeze_at": 0, "norm": "BN"},
        ),
        (
            ["MODEL.FPN.IN_FEATURES", [], "MODEL.RESNETS.OUT_FEATURES", ["res4"]],
            {"fpn_channels": None, "out_features": ["res4"]},
        ),
    ):
        with torch.device("meta"):
            ours = build_backbone(yaml_config(*changes))
            theirs = timm_backbone("resnet10t", **kwargs)
        assert ours.output_shape() == theirs.output_shape()
        for key, p in theirs.named_parameters():
            assert p.requires_grad == ours.get_parameter(key).requires_grad, key
        assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_yaml_builds_a_model() -> None:
    keys = ["MODEL.META_ARCHITECTURE", "MaskRCNN", "MODEL.RPN.IN_FEATURES", ["p3"]]
    keys += ["MODEL.ROI_HEADS.NAME", "MaskRCNNROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p3"]]
    keys += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
    model = build_model(yaml_config(*keys)).eval()
    with torch.no_grad():
        (result,) = model([{"image": torch.zeros(3, 40, 50)}])
    assert result["instances"].image_size == (40, 50)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("INPUT.FORMAT", "BGR", "are ['BGR', [123.7"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "are ['RGB', [103.5, 116.3, 123.7]"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "[1.0, 1.0, 1.0]], must be"),
    ],
)
def test_yaml_with_another_models_images_is_refused(key: str, value: Any, shown: str) -> None:
    with pytest.raises(UserError) as error:
        build_backbone(yaml_config(key, value))
    for part in (shown, "resnet10t", "must be ['RGB', [123.7, 116.3, 103.5]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "parts"),
    [
        ("resnet5", {}, ["'resnet5'", "resnet50"]),
        ("resnet10t", {"norm": "GN"}, ["'GN'", "'SyncBN'"]),
        ("resnet10t", {"out_features": ["res2", "p3"]}, ["'p3'", "'res3'"]),
        ("resnet10t", {"out_features": []}, ["[]", "'res3'"]),
        ("vit_tiny_patch16_224", {}, ["'res4'"]),
        ("hrnet_w18_small", {"freeze_at": 2}, ["freeze_at is 2", "res2", "must be 0"]),
        ("resnet10t", {"freeze_at": 6}, ["freeze_at is 6"]),
        ("tv_resnet50", {}, ["'tv_resnet50'", "resnet50"]),  # an old name
        ("resnet10t.nonsense", {}, ["'resnet10t.nonsense'", "'resnet10t',"]),
        ("resnet10t", {"options": {"dropout_path": 0.2}}, ["no option 'dropout_path'"]),
        ("vgg11_bn", {"options": {"drop_path_rate": 0.2}}, ["no option 'drop_path_rate'"]),
        ("maxvit_nano_rw_256", {"freeze_at": 0}, ["images of any size (128 x 160: width (20)"]),
        ("inception_v3", {"freeze_at": 0}, ["any size", "(192, 28, 36)", "(192, 32, 40)"]),
    ],
)
def test_what_there_is_not_is_told(name: str, kwargs: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        alone(name, **kwargs)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_options_reach_the_model_from_code_and_from_a_config() -> None:
    options = {"act_layer": nn.ELU}
    node = LazyCall(timm_backbone)(name="resnet10t", fpn_channels=None, options=options)
    for backbone in (alone("resnet10t", options=options), instantiate(node)):
        assert any(isinstance(m, nn.ELU) for m in backbone.modules())
        assert not any(isinstance(m, nn.ReLU) for m in backbone.modules())


@pytest.mark.parametrize(
    ("name", "stages", "strides"),
    [
        ("resnet10t", ["res2", "res3", "res4"], [4, 8, 16, 32]),
        ("vit_tiny_patch16_224", ["res4"], [16, 32]),
        ("efficientvit_m0", ["res4", "res5", "res6"], [16, 32, 64, 128]),
    ],
)
def test_the_fpns_last_level_is_half_of_the_last_stage(
    name: str, stages: list[str], strides: list[int]
) -> None:
    backbone = timm_backbone(name, out_features=stages, freeze_at=0, fpn_channels=8).eval()
    assert [shape.stride for shape in backbone.output_shape().values()] == strides
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 128, 256))
    assert {k: tuple(m.shape[2:]) for k, m in maps.items()} == {
        k: (128 // s.stride, 256 // s.stride) for k, s in backbone.output_shape().items()
    }


def test_without_timm_configs_are_read_and_a_model_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    cfg = get_config("backbones/swin_tiny")
    with pytest.raises(UserError, match="pip install 'timm>=1"):
        instantiate(cfg.model)
    assert resnet_backbone("ResNet-10-C4", width=8) is not None
