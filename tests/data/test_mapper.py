"""The mapper on images whose instances are not all alike."""

from pathlib import Path
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.data.mapper import MaskRCNNDatasetMapper

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
FLIP = [0, 2, 1]  # nose, left, right


def rle() -> dict[str, Any]:
    mask = np.zeros((50, 60), dtype=np.uint8, order="F")
    mask[20:40, 30:50] = 1
    mask[25:35, 35:45] = 0
    return coco_mask.encode(mask)


def annotation(x: float, **fields: Any) -> dict[str, Any]:
    box = [x, 10.0, 20.0, 20.0]
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0, **fields}


def mapped(tmp_path: Path, annotations: list[dict[str, Any]], flip: bool = False, **kwargs: Any):
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), np.zeros((50, 60, 3), dtype=np.uint8))
    mapper = MaskRCNNDatasetMapper(
        is_train=True,
        augmentations=[T.RandomFlip(prob=1.0)] if flip else [],
        image_format="BGR",
        **kwargs,
    )
    image = {"file_name": str(file), "height": 50, "width": 60, "annotations": annotations}
    return mapper(image)["instances"]


@pytest.mark.parametrize("first", [True, False])
def test_instance_without_keypoints_has_none_labelled(tmp_path: Path, first: bool) -> None:
    with_keypoints = annotation(10, keypoints=[12.0, 12.0, 2, 15.0, 15.0, 1, 0, 0, 0])
    annotations = [with_keypoints, annotation(30)]
    instances = mapped(
        tmp_path,
        annotations if first else annotations[::-1],
        use_keypoint=True,
        keypoint_hflip_indices=FLIP,
    )
    keypoints = instances.gt_keypoints.tensor
    has, has_not = (0, 1) if first else (1, 0)
    assert keypoints[has].tolist() == [[12, 12, 2], [15, 15, 1], [0, 0, 0]]
    assert keypoints[has_not].tolist() == [[0, 0, 0]] * 3


def test_flip_swaps_left_and_right(tmp_path: Path) -> None:
    instances = mapped(
        tmp_path,
        [annotation(10, keypoints=[12.0, 12.0, 2, 15.0, 15.0, 1, 0, 0, 0])],
        flip=True,
        use_keypoint=True,
        keypoint_hflip_indices=FLIP,
    )
    assert instances.gt_keypoints.tensor[0].tolist() == [[48, 12, 2], [0, 0, 0], [45, 15, 1]]
    assert instances.gt_boxes.tensor[0].tolist() == [30, 10, 50, 30]


def test_polygons_stay_polygons(tmp_path: Path) -> None:
    instances = mapped(tmp_path, [annotation(10, segmentation=SQUARE)], use_instance_mask=True)
    assert isinstance(instances.gt_masks, PolygonMasks)


@pytest.mark.parametrize("first", [True, False])
def test_polygons_and_rle_side_by_side_become_bitmaps(tmp_path: Path, first: bool) -> None:
    annotations = [annotation(10, segmentation=SQUARE), annotation(30, segmentation=rle())]
    instances = mapped(
        tmp_path, annotations if first else annotations[::-1], use_instance_mask=True
    )
    assert isinstance(instances.gt_masks, BitMasks)
    polygon, ring = (0, 1) if first else (1, 0)
    assert instances.gt_masks.tensor[polygon].sum() == 400
    assert instances.gt_masks.tensor[ring].sum() == 300


def test_format_is_chosen_for_each_image_anew(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), np.zeros((50, 60, 3), dtype=np.uint8))
    mapper = MaskRCNNDatasetMapper(
        is_train=True, augmentations=[], image_format="BGR", use_instance_mask=True
    )
    kinds = []
    for segmentation in (rle(), SQUARE, rle()):
        annotations = [annotation(10, segmentation=segmentation)]
        image = {"file_name": str(file), "height": 50, "width": 60, "annotations": annotations}
        kinds.append(type(mapper(image)["instances"].gt_masks))
    assert kinds == [BitMasks, PolygonMasks, BitMasks]


def test_crowds_are_left_out(tmp_path: Path) -> None:
    crowd = annotation(30, segmentation=rle()) | {"iscrowd": 1}
    instances = mapped(
        tmp_path, [crowd, annotation(10, segmentation=SQUARE)], use_instance_mask=True
    )
    assert len(instances) == 1
    assert isinstance(instances.gt_masks, PolygonMasks)


def test_instance_without_mask_is_named(tmp_path: Path) -> None:
    annotations = [annotation(10, segmentation=SQUARE), annotation(30)]
    with pytest.raises(ValueError, match=r"image\.png: an instance at \[30.* no 'segmentation'"):
        mapped(tmp_path, annotations, use_instance_mask=True)


def test_image_without_instances(tmp_path: Path) -> None:
    instances = mapped(
        tmp_path, [], use_instance_mask=True, use_keypoint=True, keypoint_hflip_indices=FLIP
    )
    assert len(instances) == 0
