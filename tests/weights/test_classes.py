"""Fine-tuning keeps what the classes of the same name have learnt."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training.checkpoint import SafeCheckpointer
from mask_rcnn_plugin.weights.classes import class_names_of

HEADS = "roi_heads."
SCORES, BOXES, MASKS = (
    HEADS + name
    for name in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
)


def model(classes: int, config: str = "table2a_backbone/r50_fpn") -> nn.Module:
    overrides = ["model.backbone.width=8", f"model.roi_heads.num_classes={classes}"]
    return instantiate(get_config(f"{config}+synthetic", overrides).model)


def start(
    folder: Path, classes: int, ours: list[str], config: str = "table2a_backbone/r50_fpn"
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a file, of a model as it was made, and as it starts from the file."""
    theirs, started = model(classes, config), model(len(ours), config)
    before = {k: v.clone() for k, v in started.state_dict().items()}
    torch.save({"model": theirs.state_dict()}, folder / "model_final.pth")
    checkpointer = SafeCheckpointer(started, str(folder / "out"))
    checkpointer.class_names = ours
    checkpointer.resume_or_load(str(folder / "model_final.pth"), resume=False)
    return theirs.state_dict(), before, started.state_dict()


def beside(folder: Path, names: list[str]) -> None:
    """The config.yaml that a training leaves."""
    cfg = get_config("table2a_backbone/r50_fpn")
    cfg.dataset.metadata = {"thing_classes": names}
    LazyConfig.save(cfg, str(folder / "config.yaml"))


def test_rows_go_with_the_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    beside(tmp_path, ["cat", "dog", "cow"])
    caplog.set_level(logging.INFO)
    logging.getLogger("fvcore.common.checkpoint").propagate = True
    theirs, before, after = start(tmp_path, 3, ["cow", "horse", "cat", "bird"])
    for layer, each in ((SCORES, 1), (BOXES, 4), (MASKS, 1)):
        for key in (f"{layer}.weight", f"{layer}.bias"):
            rows = theirs[key][: 3 * each].unflatten(0, (3, each))
            new, old = (w[key][: 4 * each].unflatten(0, (4, each)) for w in (after, before))
            assert torch.equal(new[0], rows[2]), key
            assert torch.equal(new[2], rows[0]), key
            assert torch.equal(new[[1, 3]], old[[1, 3]]), key
    assert torch.equal(after[f"{SCORES}.weight"][-1], theirs[f"{SCORES}.weight"][-1])
    assert "2 of your 4 classes known by name, with weights: cow, cat" in caplog.text


def test_other_names_in_the_same_number_are_not_taken_over(tmp_path: Path) -> None:
    beside(tmp_path, ["cat", "dog"])
    theirs, before, after = start(tmp_path, 2, ["dog", "bird"])
    key = f"{SCORES}.weight"
    assert torch.equal(after[key][0], theirs[key][1])
    assert torch.equal(after[key][1], before[key][1])


@pytest.mark.parametrize("config", ["class_agnostic/r50_c4", "table2e_mask_branch/mlp_2fc"])
def test_layers_without_rows_of_classes_are_whole(config: str, tmp_path: Path) -> None:
    beside(tmp_path, ["cat", "dog"])
    theirs, before, after = start(tmp_path, 2, ["cat", "bird", "dog"], config)
    key = f"{MASKS}.weight"
    expected = theirs if config.startswith("class_agnostic") else before
    assert torch.equal(after[key], expected[key])


def test_coco_is_known_by_its_80_classes(tmp_path: Path) -> None:
    theirs, _, after = start(tmp_path, 80, ["zebra", "person"])
    key = f"{SCORES}.weight"
    assert torch.equal(after[key][1], theirs[key][0])
    assert torch.equal(after[key][0], theirs[key][22])


@pytest.mark.parametrize("content", [b"\xe4: 1", b"[", b"- 1"])
def test_a_config_beside_that_is_none_names_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert class_names_of(str(tmp_path / "model_final.pth"), {}) == []


def test_unknown_names_start_anew(tmp_path: Path) -> None:
    _, before, after = start(tmp_path, 3, ["cat", "dog"])
    assert torch.equal(after[f"{SCORES}.weight"], before[f"{SCORES}.weight"])
