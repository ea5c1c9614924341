"""torchvision's models answer alike, and have the same weights, when they are converted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from detectron2.config import instantiate
from torch import Tensor, nn
from torchvision.models import detection

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.modeling import resnet_backbone
from mask_rcnn_plugin.weights import WeightsError
from mask_rcnn_plugin.weights.torchvision import from_torchvision, to_torchvision

Weights = dict[str, Tensor]
DETECTORS: dict[str, tuple[Callable[..., Any], int, str]] = {
    "mask": (detection.maskrcnn_resnet50_fpn, 91, "table2a_backbone/r50_fpn"),
    "keypoints": (detection.keypointrcnn_resnet50_fpn, 2, "table5_multitask/keypoint_only"),
    "boxes": (detection.fasterrcnn_resnet50_fpn, 6, "table3_box/faster_rcnn_r101_fpn"),
}


def draw_weights(model: nn.Module) -> None:
    """Weights, biases and statistics far from initialisation, with which something is found."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.2, 0.4) if "bn3" in name else module.weight.uniform_(
                    0.5, 1
                )
                module.bias.normal_(0, 0.1)
                if getattr(module, "num_batches_tracked", None) is not None:
                    module.num_batches_tracked.fill_(7)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.05)
            for part, std in (("cls_logits", 0.05), ("bbox_pred", 0.02), ("cls_score", 0.5)):
                if name.endswith(part):
                    module.weight.normal_(0, std)
            if name.endswith("mask_fcn_logits"):
                module.weight.normal_(0, 0.3)


def detector(kind: str) -> nn.Module:
    """With logits of classes that differ from RoI to RoI."""
    build, num_classes, _ = DETECTORS[kind]
    limits = {"box_detections_per_img": 8, "rpn_post_nms_top_n_test": 100}
    size = {"min_size": 96, "max_size": 400}
    classes = {"weights": None, "weights_backbone": None, "num_classes": num_classes}
    model = build(**classes, **size, **limits).eval()
    draw_weights(model)
    logits: list[Tensor] = []
    layer = model.roi_heads.box_predictor.cls_score
    hook = layer.register_forward_hook(lambda _, __, output: logits.append(output))
    model([image().float() / 255])
    hook.remove()
    gain = 2 / logits[0].std(dim=0)
    layer.weight.mul_(gain[:, None])
    layer.bias.sub_(logits[0].mean(dim=0)).mul_(gain)
    return model


def image() -> Tensor:
    """uint8 (3, 96, 150): padded, and of an odd number of cells at stride 32."""
    coarse = torch.rand(1, 3, 10, 15, generator=torch.Generator().manual_seed(0)) * 255
    fine = nn.functional.interpolate(coarse, (96, 150), mode="bicubic")[0]
    return fine.clamp(0, 255).byte()


def assert_equal(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@torch.no_grad()
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_converted_detector_answers_as_torchvisions(kind: str) -> None:
    _, num_classes, row = DETECTORS[kind]
    theirs = detector(kind)
    changes = ["model.backbone.name=ResNet-50-FPN", "dataset.test.max_detections=8"]
    cfg = get_config(f"{row}+torchvision", changes)
    cfg.model.roi_heads.num_classes = num_classes - 1
    cfg.model.proposal_generator.post_nms_topk = (100, 100)
    ours = instantiate(cfg.model).eval()
    converted = from_torchvision(theirs.state_dict())
    assert not ours.load_state_dict(converted, strict=False).missing_keys
    assert_equal(to_torchvision(converted), theirs.state_dict())

    # Before masks are pasted, which the two do differently.
    images, _ = theirs.transform([image().float() / 255])
    features = theirs.backbone(images.tensors)
    proposals, _ = theirs.rpn(images, features)
    (expected,), _ = theirs.roi_heads(features, proposals, images.image_sizes)
    (got,) = ours.inference([{"image": image()}], do_postprocess=False)
    assert len(got) == 8
    assert torch.equal(got.pred_classes, expected["labels"] - 1)
    assert (got.scores - expected["scores"]).abs().max() < 1e-5
    assert got.scores[0] - got.scores[-1] > 1e-3
    assert (got.pred_boxes.tensor - expected["boxes"]).abs().max() < 1e-3
    assert kind == "keypoints" or len(got.pred_classes.unique()) > 3
    if kind == "mask":
        assert (got.pred_masks - expected["masks"]).abs().max() < 1e-5
        assert got.pred_masks.std() > 0.1
    if kind == "keypoints":
        # A flat map's highest pixel is a matter of rounding.
        distance = (got.pred_keypoints - expected["keypoints"])[..., :2].abs().amax(dim=2)
        assert distance.flatten().kthvalue(int(0.99 * distance.numel())).values < 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (torchvision.models.resnet18, "ResNet-18-C5"),
        (torchvision.models.resnet50, "ResNet-50-C5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_converted_backbone_has_torchvisions_features(
    build: Callable[[], Any], name: str
) -> None:
    theirs = build().eval()
    draw_weights(theirs)
    converted = from_torchvision(theirs.state_dict())
    ours = resnet_backbone(name, stride_in_1x1=False).eval()
    incompatible = ours.load_state_dict(converted, strict=False)
    assert not incompatible.missing_keys
    unused = [k for k in incompatible.unexpected_keys if not k.endswith("num_batches_tracked")]
    assert unused == ["linear.weight", "linear.bias"]
    x = torch.rand(1, 3, 64, 96)
    part = nn.Sequential(*[*theirs.children()][:-2])  # without pooling and classes
    expected = part(x)
    assert (ours(x)["res5"] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_equal(to_torchvision(converted), theirs.state_dict())


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (torchvision.models.resnet34, "ResNet-34-C5"),
        (torchvision.models.resnet101, "ResNet-101-C5"),
        (torchvision.models.resnet152, "ResNet-152-C5"),
        (torchvision.models.resnext101_64x4d, "ResNeXt-101-C5"),
        (torchvision.models.resnext50_32x4d, ""),
    ],
    ids=lambda x: "" if isinstance(x, str) else x.__name__,
)
def test_other_backbones_have_the_shapes_and_come_back(build: Any, name: str) -> None:
    with torch.device("meta"):
        weights = build().state_dict()
        ours = resnet_backbone(name, stride_in_1x1=False).state_dict() if name else {}
    found = from_torchvision(weights)
    assert {k: v.shape for k, v in ours.items()}.items() <= {
        k: v.shape for k, v in found.items()
    }.items()
    assert {k: id(v) for k, v in to_torchvision(found).items()} == {
        k: id(v) for k, v in weights.items()
    }


def small_detector() -> Weights:
    """Weights of two classes, each of one number a row."""
    with torch.device("meta"):
        model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    sizes = {name: len(v) if v.dim() else 1 for name, v in model.state_dict().items()}
    return {name: torch.arange(float(size)) for name, size in sizes.items()}


def test_the_background_is_last() -> None:
    found = from_torchvision(small_detector())
    heads = "roi_heads."
    assert found[f"{heads}box_predictor.cls_score.bias"].tolist() == [1, 2, 0]
    assert found[f"{heads}box_predictor.bbox_pred.bias"].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert found[f"{heads}mask_head.predictor.bias"].tolist() == [1, 2]


def test_what_a_training_has_not_kept_of_the_background_is_zero() -> None:
    found = from_torchvision(small_detector())
    trained = {k: v for k, v in found.items() if not k.startswith("torchvision.")}
    back = to_torchvision(trained)
    assert back["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0, 0, 0, 0, *range(4, 12)]
    assert back["roi_heads.mask_predictor.mask_fcn_logits.bias"].tolist() == [0, 1, 2]


def test_names_of_older_versions_are_known() -> None:
    new = small_detector()
    old = {}
    for name, value in new.items():
        name = name.replace("rpn.head.conv.0.0", "rpn.head.conv")
        for i in range(4):
            name = name.replace(f"_blocks.{i}.0.", f"_blocks.{i}.")
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        old[name] = value
    assert len(old.keys() - new.keys()) == 2 + 16 + 8
    assert_equal(from_torchvision(old), from_torchvision(new))


def test_batch_norm_without_eps_is_the_same_map() -> None:
    norm = torchvision.ops.FrozenBatchNorm2d(5, eps=0.0)
    norm.running_var.copy_(torch.tensor([1e-6, 1e-4, 1e-2, 1.0, 9.0]))
    weights = {f"layer1.0.bn1.{name}": value for name, value in norm.state_dict().items()}
    found = from_torchvision(weights, eps=0.0)
    same = torchvision.ops.FrozenBatchNorm2d(5)
    same.load_state_dict({name.rpartition(".")[2]: value for name, value in found.items()})
    x = torch.rand(1, 5, 2, 2)
    assert torch.allclose(same(x), norm(x), rtol=1e-5)
    same.load_state_dict(norm.state_dict())
    assert not torch.allclose(same(x), norm(x), rtol=1e-2)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (detection.maskrcnn_resnet50_fpn_v2, "backbone.fpn.inner_blocks.0.1.weight"),
        (detection.retinanet_resnet50_fpn, "backbone.fpn.extra_blocks.p6"),
        (detection.fasterrcnn_mobilenet_v3_large_fpn, "backbone.body.0.0.weight"),
        (torchvision.models.vgg11, "features.0.weight"),
    ],
    ids=lambda x: "" if isinstance(x, str) else x.__name__,
)
def test_other_models_are_refused_by_what_they_have(build: Any, named: str) -> None:
    arguments = {} if build is torchvision.models.vgg11 else {"weights_backbone": None}
    with torch.device("meta"):
        weights = build(weights=None, **arguments).state_dict()
    with pytest.raises(WeightsError, match=f"'.*{named}.*cannot be converted"):
        from_torchvision(weights)


def test_class_agnostic_masks_do_not_go_to_torchvision() -> None:
    weights = from_torchvision(small_detector())
    weights["roi_heads.mask_head.predictor.bias"] = torch.zeros(1)
    with pytest.raises(
        WeightsError, match=r"predictor\.bias has 1 rows, must have 1 for each of 2"
    ):
        to_torchvision(weights)
