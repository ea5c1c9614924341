"""What the pages say in Python runs, in their order."""

import re
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training import setup_datasets

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def demo(toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a photo and a model that finds 20 things in it, in output/demo."""
    folder = tmp_path / "output" / "demo"
    folder.mkdir(parents=True)
    cfg = get_config(
        "table2a_backbone/r50_fpn+synthetic",
        [
            f"dataset={toy_dataset}",
            "model.roi_heads.box_predictor.test_score_thresh=0.0",
        ],
    )
    setup_datasets(cfg)
    torch.save({"model": instantiate(cfg.model).state_dict()}, folder / "model_final.pth")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    photo = cv2.imread(str(toy_dataset / "val" / "000000.jpg"))
    cv2.imwrite(str(tmp_path / "photo.jpg"), cv2.resize(photo, (700, 700)))  # some tiles
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
