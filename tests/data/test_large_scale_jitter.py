"""The overlay `lsj` through the mapper: boxes, masks and keypoints after scaling and cropping."""

from pathlib import Path
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training import setup_datasets

# Of an image of 40 x 40: a triangle, and a square in the lower right corner.
TRIANGLE = [[4.0, 4.0, 20.0, 4.0, 4.0, 20.0]]
SQUARE = [[30.0, 30.0, 38.0, 30.0, 38.0, 38.0, 30.0, 38.0]]


def rle(polygons: list[list[float]]) -> Any:
    return coco_mask.merge(coco_mask.frPyObjects(polygons, 40, 40))


def mapped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    scale: float,
    offset: float = 0.0,
    as_mask: Any = list,
    row: str = "table5_multitask/keypoint_and_mask",
) -> Any:
    """What the model gets of the image at a scale of a square of 40 pixels, cut at an offset."""
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), np.full((40, 40, 3), 255, dtype=np.uint8))
    cfg = get_config(f"{row}+lsj", ["lsj.size=40", "model.input_format=BGR"])
    augmentations = cfg.dataloader.train.mapper.augmentations
    augmentations[0].update(min_scale=scale, max_scale=scale)
    augmentations[2].prob = 0.0
    monkeypatch.setattr(np.random, "uniform", lambda low, *_: offset if low == 0 else low)
    mapper = instantiate(cfg.dataloader.train.mapper)
    annotations = [
        {
            "bbox": [x, x, side, side],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": index,
            "segmentation": as_mask(polygons),
            "keypoints": [x + 1.0, x + 1.0, 2] + [x + side, x + side, 2] * 16,
        }
        for index, (x, side, polygons) in enumerate([(4, 16, TRIANGLE), (30, 8, SQUARE)])
    ]
    return mapper({"file_name": str(file), "height": 40, "width": 40, "annotations": annotations})


@pytest.fixture(params=[0, 255], ids=["detectron2 0.6", "main"])
def padding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What detectron2 pads masks with."""

    def pad(self: Any, image: Any) -> Any:
        height, width = image.shape[:2]
        side = self.crop_size[0]
        right, bottom = max(side - width, 0), max(side - height, 0)
        return T.PadTransform(0, 0, right, bottom, width, height, 128, request.param)

    monkeypatch.setattr(T.FixedSizeCrop, "_get_pad", pad)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize(("as_mask", "kind"), [(list, PolygonMasks), (rle, BitMasks)])
def test_a_smaller_image_is_padded_and_no_mask_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_mask: Any, kind: Any
) -> None:
    """Half as large, in the upper left corner: detectron2's main alone pads the masks with 255."""
    sample = mapped(tmp_path, monkeypatch, scale=0.5, as_mask=as_mask)
    assert sample["image"].shape == (3, 40, 40)
    assert (sample["image"][:, :20, :20] == 255).all()
    assert (sample["image"][:, 20:] == 128).all()
    instances = sample["instances"]
    assert isinstance(instances.gt_masks, kind)
    atol = 0.0 if as_mask is list else 1.0  # bitmaps are of whole pixels
    expected = torch.tensor([[2.0, 2.0, 10.0, 10.0], [15.0, 15.0, 19.0, 19.0]])
    torch.testing.assert_close(instances.gt_boxes.tensor, expected, rtol=0, atol=atol)
    assert instances.gt_keypoints.tensor[:, 0].tolist() == [[2.5, 2.5, 2], [15.5, 15.5, 2]]


@pytest.mark.parametrize("as_mask", [list, rle])
def test_boxes_are_around_what_a_crop_leaves_and_empty_masks_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_mask: Any
) -> None:
    """Twice as large, its left 20 and upper 20 pixels cut away: of the triangle (8, 8), (40, 8),
    (8, 40) remains (20, 20), (28, 20), (20, 28), and nothing of the square."""
    sample = mapped(tmp_path, monkeypatch, scale=2.0, offset=0.5, as_mask=as_mask)
    assert sample["image"].shape == (3, 40, 40)
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == [0]
    # Bitmaps are of whole pixels of the image before it was enlarged.
    atol = 0.01 if as_mask is list else 2
    expected = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    torch.testing.assert_close(instances.gt_boxes.tensor, expected, rtol=0, atol=atol)
    # (5, 5) is now at -10, and (20, 20) at 20.
    assert instances.gt_keypoints.tensor[0, :, 2].tolist() == [0] + [2] * 16


def test_without_masks_boxes_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of (8, 8, 40, 40) remains (0, 0, 20, 20); of (60, 60, 76, 76) nothing."""
    row = "table5_multitask/keypoint_only"
    instances = mapped(tmp_path, monkeypatch, scale=2.0, offset=0.5, row=row)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 20, 20]]
    assert not instances.has("gt_masks")


@pytest.mark.parametrize("as_mask", [list, rle])
@pytest.mark.parametrize(("scale", "offset", "classes"), [(2.0, 0.65, [1]), (4.0, 0.62, [])])
def test_an_instance_with_an_empty_mask_is_dropped_though_its_box_is_not_empty(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    offset: float,
    classes: list[int],
    as_mask: Any,
) -> None:
    """Twice as large, (26, 26, 66, 66) has a corner of the triangle's box alone, and of the square
    a part; at four times, (74, 74, 114, 114) has no more than a corner of that box."""
    kind = {"as_mask": as_mask}
    instances = mapped(tmp_path, monkeypatch, scale=scale, offset=offset, **kind)["instances"]
    assert instances.gt_classes.tolist() == classes
    assert len(instances.gt_boxes) == len(instances.gt_masks) == len(instances)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "table5_multitask/keypoint_and_mask+synthetic+lsj",
            "table2a_backbone/r50_c4+ablation+lsj",
        ),
        "table5_multitask/box_only+lsj+synthetic",
    ],
)
def test_batches_of_drawn_images_train(name: str, toy_overrides: list[str]) -> None:
    cfg = get_config(name, [*toy_overrides, "lsj.size=64"])
    setup_datasets(cfg)
    loader = iter(instantiate(cfg.dataloader.train))
    model = instantiate(cfg.model)
    samples = [sample for _ in range(6) for sample in next(loader)]
    assert {tuple(sample["image"].shape) for sample in samples} == {(3, 64, 64)}
    for sample in samples:
        boxes = sample["instances"].gt_boxes
        assert boxes.nonempty().all()
        assert (boxes.tensor >= 0).all()
        assert (boxes.tensor <= 64).all()
    with EventStorage():
        losses = model(samples[:4])
    assert torch.isfinite(sum(losses.values()))
