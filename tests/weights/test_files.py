import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training.checkpoint import SafeCheckpointer
from mask_rcnn_plugin.training.setup import check_initialization
from mask_rcnn_plugin.weights import WeightsError, resolve_weights
from mask_rcnn_plugin.weights.loader import read_weights

ROW = "table2a_backbone/r50_fpn"


class Detector(nn.Module):
    """A backbone of three layers, and two heads."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        self.heads = nn.ModuleDict({"box": nn.Linear(2, classes + 1), "mask": nn.Linear(2, 2)})


def start(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save({"model": weights}, folder / "weights.pth")
    SafeCheckpointer(model, str(folder)).resume_or_load(str(folder / "weights.pth"), resume=False)


def test_names_are_matched_by_every_version_of_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Release 0.6 and today's main match them if a file or an address says so, and main asks for
    the address."""

    def load_file(self: DetectionCheckpointer, filename: str) -> dict[str, Any]:
        assert self._parsed_url_during_load is not None, "must be called inside `load`"
        loaded = Checkpointer._load_file(self, filename)
        return loaded if "model" in loaded else {"model": loaded}

    monkeypatch.setattr(DetectionCheckpointer, "_load_file", load_file)
    model, other = Detector(), Detector()
    start(model, other.backbone.state_dict(), tmp_path)
    assert torch.equal(model.backbone[2].bias, other.backbone[2].bias)
    assert "0.weight" in read_weights(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ("res{}.conv1.weight", "the file has res0.conv1.weight"),
        ("layer{}.0.conv1.weight", "python tools/convert_weights.py --from torchvision "),
        ("backbone.body.layer{}.0.conv1.weight", "tools/convert_weights.py"),
    ],
)
def test_a_file_without_the_backbone_is_refused_and_the_conversion_named(
    names: str, hint: str, tmp_path: Path
) -> None:
    weights = {names.format(i): torch.zeros(2, 2) for i in range(5)}
    with pytest.raises(WeightsError) as error:
        start(Detector(), weights, tmp_path)
    for part in ("weights.pth", "0 of the 6", hint):
        assert part in str(error.value)


def test_weights_of_another_backbone_are_told_by_their_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("source: {config: a_row+synthetic, new_keys: []}")
    with pytest.raises(WeightsError, match=r"trained as a_row\+synthetic.*backbone"):
        start(Detector(), {"backbone.other": torch.zeros(2)}, tmp_path)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("row", [ROW, "table2a_backbone/r50_c4"])
def test_torchvisions_resnet_is_refused_as_it_is(row: str, norm: str, tmp_path: Path) -> None:
    """A few of its names fit, and batch norm takes its statistics for granted."""
    cfg = get_config(row, [f"model.backbone.norm={norm}"])
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    checkpointer = SafeCheckpointer(instantiate(cfg.model), str(tmp_path))
    with pytest.raises(WeightsError, match=r"resnet50\.pth.*convert_weights\.py"):
        checkpointer.resume_or_load(str(tmp_path / "resnet50.pth"), resume=False)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "nothing"),
        ([torch.zeros(1)], "is a list"),
        ({"state_dict": {"w": torch.zeros(1)}, "epoch": 3}, "'state_dict', 'epoch'"),
        ({"model": {"backbone": {"w": torch.zeros(1)}}}, "'backbone'"),
    ],
)
def test_a_file_of_anything_else_is_told_by_what_it_holds(
    content: Any, found: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=f"weights.pth.*{found}.*'model'"):
        SafeCheckpointer(Detector()).load_strictly(str(tmp_path / "weights.pth"))


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    for weights in (tmp_path, tmp_path / "no.pth"):
        with pytest.raises(WeightsError, match="no file of .pth, .pkl, .pyth"):
            resolve_weights(str(weights))


def test_weights_of_a_wider_network_are_refused(tmp_path: Path) -> None:
    """Batch norm behind each block fits, as a stem does."""
    wide = instantiate(get_config(ROW).model.backbone).state_dict()
    wide |= {k: torch.cat([v, v]) for k, v in wide.items() if re.search(r"res.*conv[12]\.", k)}
    torch.save({f"backbone.{k}": v for k, v in wide.items()}, tmp_path / "wide.pth")
    checkpointer = SafeCheckpointer(instantiate(get_config(ROW).model), str(tmp_path))
    with pytest.raises(WeightsError, match=r"have \d+ of the 159 weights of the backbone"):
        checkpointer.resume_or_load(str(tmp_path / "wide.pth"), resume=False)


def test_a_backbone_alone_is_a_start(tmp_path: Path) -> None:
    model, other = Detector(), Detector()
    weights = {k: v for k, v in other.state_dict().items() if k.startswith("backbone.")}
    start(model, weights, tmp_path)
    assert torch.equal(model.backbone[2].bias, other.backbone[2].bias)


def test_another_number_of_classes_is_one_calm_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Detector(classes=80).state_dict()
    del weights["heads.mask.weight"], weights["heads.mask.bias"]
    weights["fc1000.weight"] = torch.zeros(3)
    with caplog.at_level(logging.INFO):
        start(Detector(classes=4), weights, tmp_path)
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    (line,) = [r.message for r in caplog.records if "newly initialized" in r.message]
    for part in ("6 of 10", "heads.box.bias is [81] in the file, [5] in", "heads.mask", "fc1000"):
        assert part in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], ["model.backbone.freeze_at=0", "model.backbone.norm=BN"]),
        (["model.backbone.norm=BN"], ["model.backbone.freeze_at=2", "model.backbone.freeze_at=0"]),
        (["model.backbone.freeze_at=0"], ["model.backbone.norm=FrozenBN"]),
    ],
)
def test_frozen_layers_do_not_start_at_random(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(WeightsError) as error:
        check_initialization(get_config(ROW, ["train.init_checkpoint=", *overrides]))
    assert all(part in str(error.value) for part in ["train.init_checkpoint", *named])


def test_frozen_layers_in_a_list_are_named_too() -> None:
    cfg = get_config(ROW, ["train.init_checkpoint="])
    cfg.model.backbone = {"stages": [{"norm": "BN"}, {"norm": "FrozenBN"}]}
    with pytest.raises(WeightsError, match=r"model\.backbone\.stages\.1\.norm=BN$"):
        check_initialization(cfg)


def test_a_start_from_weights_or_with_nothing_frozen_is_fine() -> None:
    check_initialization(get_config(ROW))
    check_initialization(get_config(f"{ROW}+synthetic"))
    free = ["model.backbone.norm=BN", "model.backbone.freeze_at=0"]
    check_initialization(get_config(ROW, ["train.init_checkpoint=", *free]))
