"""What the pages say in Python runs, in their order."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads

from mask_rcnn_plugin import add_mask_rcnn_config, get_config, load
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.modeling import (
    MASK_LOSS_REGISTRY,
    ROI_LAYER_REGISTRY,
    IndependentMasks,
    RoIAlign,
)
from mask_rcnn_plugin.training import setup_datasets
from train import do_train

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_predict(demo: Path) -> None:
    names: dict[str, object] = {}
    for code in blocks("predict.md"):
        if "sahi" in code:
            pytest.importorskip("sahi")
        exec(code.replace("(400, 600, 800)", "(48, 64)"), names)  # quick
    assert (demo / "found.jpg").is_file()
    assert len(names["augmented"]("photo.jpg")) > 20  # of all sizes together  # type: ignore[operator]
    assert len(names["detections"]) > 0  # type: ignore[arg-type]
    assert names["detections"].data["class_name"][0] in names["predictor"].names  # type: ignore[attr-defined]
    assert len(names["tiled"].object_prediction_list) > 0  # type: ignore[attr-defined]
    assert (demo / "tiled.png").is_file()


def test_extend(toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's files train and predict together, and the parts are used."""
    for code in blocks("extend.md"):
        (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = [
        *(f"dataset={toy_dataset}", "dataloader.train.total_batch_size=2", "train.max_iter=1"),
        *(
            "train.output_dir=out",
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
        ),
    ]
    with pytest.raises(ConfigError, match="model.backbone.freeze_at"):
        get_config("my_config.py+lsj_100ep", small)
    model = trained("my_config.py+synthetic", small)
    head = model.roi_heads.mask_head
    assert type(head).__name__ == "DropoutMaskHead"
    assert type(head.masks).__name__ == "DiceMasks"
    assert type(model.roi_heads.mask_pooler.level_poolers[0]).__name__ == "ShrunkAlign"


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm(toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (code for code in blocks("extend.md") if "timm" in code)
    (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    monkeypatch.chdir(tmp_path)
    small = [
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *(f"dataset.synthetic.root={toy_dataset}", "dataloader.train.total_batch_size=2"),
        *("train.max_iter=1", "train.output_dir=out"),
    ]
    model = trained("my_timm.py+ablation", small)
    assert "layer4" in model.backbone.bottom_up.features
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def trained(config: str, overrides: list[str]) -> Any:
    """The model that a training leaves in the folder out."""
    cfg = get_config(config, overrides)
    setup_datasets(cfg)
    do_train(cfg)
    LazyConfig.save(cfg, "out/config.yaml")
    return load("out").model


def test_what_is_registered_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tilted(RoIAlign):
        pass

    class Dice(IndependentMasks):
        pass

    for registry, own in ((ROI_LAYER_REGISTRY, Tilted), (MASK_LOSS_REGISTRY, Dice)):
        monkeypatch.setattr(registry, "_obj_map", {**registry._obj_map, own.__name__: own})
    keys = ["model.roi_heads.mask_pooler.pooler_type", "model.roi_heads.mask_head.loss_type"]
    row = "table2a_backbone/r50_fpn+synthetic"
    cfg = get_config(row, [f"{keys[0]}=Tilted", f"{keys[1]}=Dice"])
    heads = instantiate(cfg.model.roi_heads)
    assert isinstance(heads.mask_pooler.level_poolers[0], Tilted)
    assert isinstance(heads.mask_head.masks, Dice)
    for key, name in zip(keys, ("Tited", "no_module.Dice")):
        with pytest.raises(ConfigError, match=rf"{key} is '{name}', must be one of .*class"):
            get_config(row, [f"{key}={name}"])

    yaml = get_cfg()
    add_mask_rcnn_config(yaml)
    yaml.MODEL.MASK_ON = True
    yaml.MODEL.ROI_HEADS.update(NAME="MaskRCNNROIHeads", IN_FEATURES=["res4"])
    yaml.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_FC=1, POOLER_TYPE="Tilted")
    yaml.MODEL.ROI_MASK_HEAD.update(NAME="MaskRCNNFCNHead", LOSS_TYPE="Dice")
    built = build_roi_heads(yaml, {"res4": ShapeSpec(channels=8, stride=16)})
    assert isinstance(built.box_pooler.level_poolers[0], Tilted)
    assert isinstance(built.mask_head.masks, Dice)
