"""The recipes run, and keep what the page says they do."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import BoxMode, polygons_to_bitmask
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms import v2

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.check import check_file
from mask_rcnn_plugin.data.synthetic import write_dataset

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
FILES = {
    code.splitlines()[0].removeprefix("# "): code
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with the page's files, which Python imports from it."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "data"
    write_dataset(root, train=30, val=0, size=128, seed=0)
    return root


@pytest.fixture
def converted(folder: Path, drawn: Path) -> Path:
    """Drawn data as my/train.json, in all formats and back."""
    pytest.importorskip("supervision")
    (folder / "my").mkdir()
    (folder / "my" / "images").symlink_to(drawn / "train")
    (folder / "my" / "train.json").symlink_to(drawn / "train.json")
    exec(FILES["from_coco.py"], {})
    exec(FILES["to_coco.py"], {})
    pictures = importlib.import_module("mask_pictures")
    conversions = importlib.import_module("conversions")
    pictures.write_masks(conversions.read_coco("my/train.json", "my/images"), "masks")
    conversions.write_coco(pictures.read_masks("my/images", "masks"), "from_masks.json")
    return folder


def best_ious(before: Path, after: Path) -> tuple[list[float], list[bool]]:
    """Of each object that is no crowd, with one of its class in the other file; and whether it is
    in one piece."""
    first, second = COCO(str(before)), COCO(str(after))
    ids = {image["file_name"]: image["id"] for image in second.dataset["images"]}
    names = [{c["id"]: c["name"] for c in coco.dataset["categories"]} for coco in (first, second)]
    ious, whole = [], []
    for image in first.dataset["images"]:
        others = second.loadAnns(second.getAnnIds(ids[image["file_name"]]))
        for annotation in first.loadAnns(first.getAnnIds(image["id"], iscrowd=False)):
            name = names[0][annotation["category_id"]]
            found = [second.annToRLE(o) for o in others if names[1][o["category_id"]] == name]
            rle = first.annToRLE(annotation)
            ious.append(coco_mask.iou([rle], found, [0] * len(found)).max() if found else 0.0)
            contours, _ = cv2.findContours(
                coco_mask.decode(rle), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
            )
            whole.append(len(contours) == 1)
    return ious, whole


def objects(file: Path) -> int:
    return len(json.loads(file.read_text())["annotations"])


def test_masks_come_back_from_other_formats(converted: Path) -> None:
    before = converted / "my" / "train.json"
    for other in ("yolo", "voc", "labelme", "masks"):
        after = converted / f"from_{other}.json"
        ious, whole = best_ious(before, after)
        assert len(ious) > 60
        assert 0.5 < np.mean(whole) < 0.95
        kept = [iou for iou, w in zip(ious, whole) if w or other in ("labelme", "masks")]
        assert min(kept) >= 0.99, other
        rest = [iou for iou, w in zip(ious, whole) if not w]
        if other in ("yolo", "voc"):  # as the page says
            assert np.mean([iou < 0.99 for iou in rest]) > 0.5
            assert objects(after) > len(ious)
        else:
            assert objects(after) == len(ious)
        findings = check_file(str(after), "my/images", needs_mask=True).findings
        assert not findings.count("error"), findings.table()


def test_what_the_page_says_of_supervisions_own_coco_files(converted: Path) -> None:
    conversions = importlib.import_module("conversions")
    dataset = conversions.read_coco("my/train.json", "my/images")
    dataset.as_coco(annotations_path="own.json")
    own = json.loads((converted / "own.json").read_text())["annotations"]
    assert any(annotation["iscrowd"] for annotation in own)
    ious, _ = best_ious(converted / "my" / "train.json", converted / "own.json")
    assert np.mean([iou < 0.99 for iou in ious]) > 0.5


def test_fewer_points_cost_more(converted: Path) -> None:
    supervision = importlib.import_module("supervision")
    conversions = importlib.import_module("conversions")
    dataset = conversions.read_coco("my/train.json", "my/images")
    dataset.as_yolo(None, "few/labels", "yolo/data.yaml", approximation_percentage=0.25)
    read = supervision.DetectionDataset.from_yolo
    few = read("yolo/images", "few/labels", "yolo/data.yaml", force_masks=True)
    conversions.write_coco(few, "few.json")
    ious, whole = best_ious(converted / "my" / "train.json", converted / "few.json")
    assert min(iou for iou, w in zip(ious, whole) if w) < 0.99


def test_a_few_images_have_the_new_class(folder: Path, drawn: Path) -> None:
    root = folder / "output" / "synthetic_192_1200_200_0"
    root.mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(drawn / "train.json", root / f"{split}.json")
    exec(FILES["new_class.py"].replace("16", "3"), {})
    all_images = len(json.loads((root / "val.json").read_text())["images"])
    for split in ("train", "val"):
        few = json.loads((root / f"few_{split}.json").read_text())
        names = {c["id"]: c["name"] for c in few["categories"]}
        assert list(names.values()) == ["person", "circle", "square", "asterisk", "ring"]
        stars = {a["image_id"] for a in few["annotations"] if names[a["category_id"]] == "asterisk"}
        images = {image["id"] for image in few["images"]}
        assert {a["image_id"] for a in few["annotations"]} <= images
        if split == "train":
            assert len(stars) == 3
            assert stars <= images
            assert len(images) < all_images
        else:
            assert len(stars) > 3
            assert len(images) == all_images


def test_no_group_is_in_both_parts(folder: Path) -> None:
    images = [{"id": i, "file_name": f"patient{i % 7}_{i:03d}.jpg"} for i in range(50)]
    annotations = [{"id": i, "image_id": i % 50} for i in range(120)]
    (folder / "my").mkdir()
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (folder / "my" / "all.json").write_text(json.dumps(content))
    exec(FILES["split_by_group.py"], {"__name__": "__main__"})
    parts = [json.loads((folder / "my" / f"all_{n}.json").read_text()) for n in ("train", "val")]
    groups = [{i["file_name"].split("_")[0] for i in part["images"]} for part in parts]
    assert [len(g) for g in groups] == [6, 1]
    assert not groups[0] & groups[1]
    assert sum(len(part["images"]) for part in parts) == 50
    assert sum(len(part["annotations"]) for part in parts) == 120
    for part in parts:
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= ids
        assert part["categories"] == [{"id": 1}]


TRIANGLE = np.array([[30.0, 20.0], [90.0, 40.0], [40.0, 80.0]])


@pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="torchvision is older than 0.23")
@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomAffine(degrees=30, translate=[0.3, 0.3], scale=[0.7, 1.3], shear=10),
        v2.RandomPerspective(distortion_scale=0.4, p=1.0),
        v2.RandomHorizontalFlip(p=0.5),
        v2.RandomResizedCrop(80, scale=(0.7, 1.0)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_image_masks_boxes_and_points_are_transformed_alike(folder: Path, transform: Any) -> None:
    augmentation = importlib.import_module("my_augmentation").TorchVision(transform)
    mask = polygons_to_bitmask([TRIANGLE.reshape(-1)], 100, 120).astype(np.uint8)
    image = np.stack([mask * 255, mask * 100, mask * 0], axis=2)  # blue and green
    np.random.seed(0)
    shapes = set()
    for _ in range(5):
        given = T.AugInput(image.copy())
        drawn = T.AugmentationList([augmentation])(given)
        height, width = given.image.shape[:2]
        assert given.image[..., 2].max() == 0  # no red
        seen = given.image[..., 0] > 127
        masked = drawn.apply_segmentation(mask.copy())
        assert masked.shape == (height, width)
        polygon = drawn.apply_polygons([TRIANGLE.copy()])[0]
        filled = polygons_to_bitmask([polygon.reshape(-1).astype(float)], height, width)
        for other in (masked > 0, filled):
            assert (seen & other).sum() / (seen | other).sum() > 0.9
        points = drawn.apply_coords(TRIANGLE.copy())
        np.testing.assert_allclose(points, polygon, atol=1e-3)
        (box,) = drawn.apply_box(np.array([[30.0, 20.0, 90.0, 80.0]]))
        assert (points >= box[:2] - 1).all()
        assert (points <= box[2:] + 1).all()
        shapes.add(points.round(2).tobytes())
    assert len(shapes) > 1  # other numbers for each image


@pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="torchvision is older than 0.23")
def test_a_config_with_torchvisions_transforms(folder: Path, drawn: Path) -> None:
    cfg = get_config("my_config.py", ["model.input_format=BGR"])
    mapper = instantiate(cfg.dataloader.train.mapper)
    before = torch.random.get_rng_state()
    annotation = {"bbox": [40, 40, 50, 50], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    polygon = [[40.0, 40.0, 90.0, 40.0, 90.0, 90.0, 40.0, 90.0]]
    file = str(drawn / "train" / "000000.jpg")
    record = {"file_name": file, "height": 128, "width": 128}
    record["annotations"] = [{**annotation, "segmentation": polygon}]
    instances = mapper(record)["instances"]
    assert len(instances) == 1
    (left, top, right, bottom) = instances.gt_masks.get_bounding_boxes().tensor[0].tolist()
    box = instances.gt_boxes.tensor[0].tolist()
    np.testing.assert_allclose(box, [left, top, right, bottom], atol=0.01)
    assert torch.equal(torch.random.get_rng_state(), before)
