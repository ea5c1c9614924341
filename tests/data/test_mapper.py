"""The mapper on images whose instances are not all alike, and on what it cannot use."""

import math
import pickle
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from detectron2.utils.logger import log_first_n
from PIL import Image
from pycocotools import mask as coco_mask

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.mapper import ImageError, MaskRCNNDatasetMapper

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
    cv2.imwrite(str(file), np.full((50, 60, 3), 255, dtype=np.uint8))
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


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_augmentations_may_write_to_the_image(tmp_path: Path, image_format: str) -> None:
    class Blacken(T.Augmentation):
        def get_transform(self, image: np.ndarray) -> T.Transform:
            image[:] = 0
            return T.NoOpTransform()

    cv2.imwrite(str(tmp_path / "image.png"), np.full((5, 6, 3), 255, dtype=np.uint8))
    mapper = MaskRCNNDatasetMapper(
        is_train=True, augmentations=[Blacken()], image_format=image_format
    )
    image = {"file_name": str(tmp_path / "image.png"), "height": 5, "width": 6, "annotations": []}
    assert mapper(image)["image"].max() == 0


def test_masks_that_are_resized_cost_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), np.full((50, 60, 3), 255, dtype=np.uint8))
    mapper = MaskRCNNDatasetMapper(
        is_train=True, augmentations=[T.Resize((25, 30))], image_format="BGR",
        use_instance_mask=True, instance_mask_format="bitmask",
    )  # fmt: skip
    mask = np.zeros((50, 60), np.uint8, order="F")
    mask[10:30, 5:25] = 1
    square = annotation(5, segmentation=coco_mask.encode(mask))
    image = {"file_name": str(tmp_path / "image.png"), "height": 50, "width": 60}
    torch.set_warn_always(True)  # not the first time alone
    try:
        instances = mapper({**image, "annotations": [square]})["instances"]
    finally:
        torch.set_warn_always(False)
    assert instances.gt_masks.tensor.sum() == 100
    assert [str(w.message) for w in recwarn if "writable" in str(w.message)] == []


def test_integers_keep_their_fractions_when_resized(tmp_path: Path) -> None:
    """Half the size: detectron2 alone gives [2, 5, 12, 15]."""
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), np.full((50, 60, 3), 255, dtype=np.uint8))
    mapper = MaskRCNNDatasetMapper(
        is_train=True,
        augmentations=[T.Resize((25, 30))],
        image_format="BGR",
        use_instance_mask=True,
    )
    square = annotation(5, segmentation=[[5, 11, 25, 11, 25, 31, 5, 31]]) | {
        "bbox": [5, 11, 20, 20]
    }
    image = {"file_name": str(file), "height": 50, "width": 60, "annotations": [square]}
    instances = mapper(image)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[2.5, 5.5, 12.5, 15.5]]
    (polygon,) = instances.gt_masks.polygons[0]
    assert polygon.tolist() == [2.5, 5.5, 12.5, 5.5, 12.5, 15.5, 2.5, 15.5]


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
    cv2.imwrite(str(file), np.full((50, 60, 3), 255, dtype=np.uint8))
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


BAD_INSTANCES = [
    ({}, "no segmentation"),
    ({"segmentation": []}, "no segmentation"),
    ({"segmentation": [[10.0, 10.0, 30.0, 10.0]]}, "polygon has 2 points"),
    ({"segmentation": [[10.0, 10.0, 30.0, 10.0, 30.0]]}, "polygon has 5 coordinates"),
    ({"segmentation": [[10.0, 10.0, 30.0, math.nan, 30.0, 30.0]]}, "not finite"),
    ({"segmentation": [[1e300, 10.0, 30.0, 10.0, 30.0, 30.0]]}, "far outside"),
    ({"segmentation": rle() | {"size": [60, 50]}}, "RLE size is"),
    # Each of these made pycocotools end the interpreter or read memory that is not its own.
    ({"segmentation": {"size": [50, 60], "counts": b"\xff" * 40}}, "RLE counts"),
    ({"segmentation": {"size": [50, 60], "counts": rle()["counts"] * 50}}, "RLE counts"),
    ({"segmentation": {"size": [50, 60], "counts": [100]}}, "RLE counts sum to 100"),
    ({"segmentation": {"size": [50, 60]}}, "RLE counts"),
    ({"segmentation": 5}, "segmentation is 5"),
    ({"segmentation": np.ones((50, 60), bool)}, "must be polygons or RLE"),
    ({"segmentation": SQUARE, "bbox": [30.0, 10.0, 0.0, 20.0]}, "side of 0"),
    ({"segmentation": SQUARE, "bbox": [30.0, 10.0, -5.0, 20.0]}, "negative"),
    ({"segmentation": SQUARE, "bbox": [30.0, math.inf, 5.0, 20.0]}, "not finite"),
    ({"segmentation": SQUARE, "bbox": [30.0, 10.0, 5.0]}, "must be 4 numbers"),
    ({"segmentation": SQUARE, "bbox": "box"}, "must be 4 numbers"),
    (
        {"segmentation": SQUARE, "bbox": [30, 10, 20, 30], "bbox_mode": BoxMode.XYXY_ABS},
        "negative side",
    ),
    (
        {"segmentation": SQUARE, "bbox": [30, "10", 2, 3], "bbox_mode": BoxMode.XYXY_ABS},
        "must be 4 numbers",
    ),
    ({"segmentation": SQUARE, "keypoints": [1.0, 2.0, 2]}, "must be 3 x 3"),
    ({"segmentation": SQUARE, "keypoints": [math.nan, 2.0, 2] * 3}, "not finite"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD_INSTANCES)
def test_bad_instance_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], reason: str
) -> None:
    good = annotation(10, segmentation=SQUARE)
    instances = mapped(
        tmp_path,
        [annotation(30) | {"id": 77} | fields, good],
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=FLIP,
    )
    assert instances.gt_boxes.tensor.tolist() == [[10, 10, 30, 30]]
    assert len(instances.gt_masks) == len(instances.gt_keypoints) == 1
    (record,) = caplog.records
    assert re.search(rf"image\.png: .* id 77: .*{re.escape(reason)}", record.message)


def test_a_loader_of_ones_own_may_give_arrays_and_tuples(tmp_path: Path) -> None:
    keypoints = np.array([[12.0, 12, 2], [15, 15, 1], [0, 0, 0]])
    box = np.array([10, 10, 20, 20])
    instances = mapped(
        tmp_path,
        [annotation(0, segmentation=tuple(SQUARE), keypoints=keypoints) | {"bbox": box}],
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=FLIP,
    )
    assert instances.gt_boxes.tensor.tolist() == [[10, 10, 30, 30]]
    assert instances.gt_masks.polygons[0][0].tolist() == SQUARE[0]
    assert instances.gt_keypoints.tensor[0].tolist() == keypoints.tolist()


def test_what_no_branch_needs_is_not_looked_at(tmp_path: Path) -> None:
    assert len(mapped(tmp_path, [annotation(10, segmentation=5, keypoints=[1])])) == 1


def test_boxes_of_two_corners_are_judged_as_such(tmp_path: Path) -> None:
    corners = annotation(10) | {"bbox": [55, 45, 60, 50], "bbox_mode": BoxMode.XYXY_ABS}
    assert mapped(tmp_path, [corners]).gt_boxes.tensor.tolist() == [[55, 45, 60, 50]]


@pytest.mark.parametrize("width", [2**63 - 1, 2**63, 1e308])
def test_boxes_far_beyond_the_image_are_clipped(tmp_path: Path, width: float) -> None:
    wide = annotation(10) | {"bbox": [10, 10, width, 20]}
    assert mapped(tmp_path, [wide]).gt_boxes.tensor.tolist() == [[10, 10, 60, 30]]


@pytest.mark.parametrize("iscrowd", [None, False, 0.0])
def test_what_is_no_crowd_is_kept(tmp_path: Path, iscrowd: Any) -> None:
    assert len(mapped(tmp_path, [annotation(10, iscrowd=iscrowd)])) == 1


def test_uncompressed_rle_is_taken(tmp_path: Path) -> None:
    runs = {"size": [50, 60], "counts": [50 * 10 + 7, 3, 50 * 50 - 10]}
    instances = mapped(tmp_path, [annotation(10, segmentation=runs)], use_instance_mask=True)
    assert instances.gt_masks.tensor[0].nonzero().tolist() == [[7, 10], [8, 10], [9, 10]]


def test_image_that_loses_all_instances_is_background(tmp_path: Path) -> None:
    instances = mapped(
        tmp_path,
        [annotation(10), annotation(30)],
        use_instance_mask=True,
        recompute_boxes=True,
    )
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64


def test_a_warning_is_given_once_and_seldom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), np.full((50, 60, 3), 255, dtype=np.uint8))
    mapper = MaskRCNNDatasetMapper(
        is_train=True, augmentations=[], image_format="BGR", use_instance_mask=True
    )
    image = {"file_name": str(tmp_path / "image.png"), "height": 50, "width": 60}
    for count, warnings in ((3, 3), (3, 3), (10, 10), (15, 10), (16, 11), (31, 11), (100, 13)):
        mapper(image | {"annotations": [annotation(10)] * count})
        assert len(caplog.records) == warnings
    assert "index 63: no segmentation (64 left out so far)" in caplog.records[-1].message


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """Files of 64 x 48 pixels; `good` has the same noise as the others, as far as they can."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    good = Image.fromarray(noise)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    good.save(tmp_path / "good.png")
    good.save(tmp_path / "jpeg.jpg")
    good.save(tmp_path / "rotated.jpg", exif=exif)
    for mode, suffix in (("L", "png"), ("1", "png"), ("P", "png"), ("CMYK", "jpg")):
        good.convert(mode).save(tmp_path / f"{mode}.{suffix}")
    good.convert("RGBA").save(tmp_path / "RGBA.png")
    good.convert("LA").save(tmp_path / "LA.png")
    deep = noise[:, :, 0].astype(np.uint16) * 256 + 17
    Image.fromarray(deep).save(tmp_path / "16-bit.png")
    Image.fromarray(deep).save(tmp_path / "16-bit.tif")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    whole = (tmp_path / "jpeg.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    png = bytearray((tmp_path / "good.png").read_bytes())
    (tmp_path / "truncated.png").write_bytes(png[:4000])
    start = png.index(b"IDAT") + 4
    png[start : start + 30] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(png)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    # A header of 30,000 x 30,000 pixels, and none of them.
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + bytes(4) + b"IDAT")
    return {file.name: file for file in tmp_path.iterdir()}


def image_mapper(is_train: bool) -> MaskRCNNDatasetMapper:
    return MaskRCNNDatasetMapper(is_train=is_train, augmentations=[], image_format="BGR")


def record(file: Path | str, **fields: Any) -> dict[str, Any]:
    return {
        "file_name": str(file),
        "height": 48,
        "width": 64,
        "image_id": 1,
        "annotations": [annotation(10)],
        **fields,
    }


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        *(("jpeg.jpg", 127), ("L.png", 127), ("1.png", 127), ("P.png", 127), ("CMYK.jpg", 127)),
        *(("RGBA.png", 127), ("LA.png", 127), ("16-bit.png", 127), ("16-bit.tif", 127)),
    ],
)
def test_every_kind_of_image_becomes_8_bit_bgr(
    images: dict[str, Path], name: str, mean: float
) -> None:
    mapped_image = image_mapper(is_train=True)(record(images[name]))
    assert mapped_image["image"].dtype == torch.uint8
    assert mapped_image["image"].shape == (3, 48, 64)
    assert mapped_image["image"].float().mean() == pytest.approx(mean, abs=2)
    assert len(mapped_image["instances"]) == 1


def test_16_bits_are_lose_the_lower_8_not_the_upper(images: dict[str, Path]) -> None:
    red = cv2.imread(str(images["good.png"]))[:, :, 2]
    for name in ("16-bit.png", "16-bit.tif"):
        image = image_mapper(is_train=False)(record(images[name]))["image"]
        assert (image.numpy() == red).all()


@pytest.mark.parametrize("image_format", ["BGR", "L"])
@pytest.mark.parametrize(("short", "most"), [(80, 1), (48, 0), (30, 12)])
def test_a_resize_with_opencv_is_detectron2s_to_rounding(
    tmp_path: Path, image_format: str, short: int, most: int
) -> None:
    """Boxes are the same, as the transforms are."""
    smooth = np.add.outer(np.linspace(0, 120, 48), np.linspace(0, 120, 64)).astype(np.uint8)
    Image.fromarray(np.stack([smooth, 255 - smooth, smooth // 2], 2)).save(tmp_path / "a.png")
    theirs, ours = (
        MaskRCNNDatasetMapper(
            is_train=True,
            augmentations=[T.ResizeShortestEdge(short, 999), T.RandomFlip(1.0)],
            image_format=image_format,
            **options,
        )(record(tmp_path / "a.png"))
        for options in ({}, {"resize": "opencv"})
    )
    assert ours["image"].shape == theirs["image"].shape
    difference = (ours["image"].int() - theirs["image"].int()).abs()
    assert difference.max() <= most
    assert torch.equal(*(mapped["instances"].gt_boxes.tensor for mapped in (ours, theirs)))


def test_other_resizes_stay_detectron2s(images: dict[str, Path]) -> None:
    nearest = T.Resize((24, 32), Image.NEAREST)
    theirs, ours = (
        MaskRCNNDatasetMapper(True, augmentations=[nearest], image_format="BGR", resize=resize)(
            record(images["good.png"])
        )
        for resize in ("pillow", "opencv")
    )
    assert torch.equal(ours["image"], theirs["image"])


def test_a_config_takes_the_resize() -> None:
    key = "dataloader.train.mapper.resize"
    cfg = get_config("table2a_backbone/r50_fpn", [f"{key}=opencv"])
    assert cfg.dataloader.train.mapper.resize == "opencv"
    with pytest.raises(ConfigError, match=f"{key} is 'fast'"):
        get_config("table2a_backbone/r50_fpn", [f"{key}=fast"])


def test_exif_rotation_is_applied(images: dict[str, Path]) -> None:
    image = image_mapper(True)(record(images["rotated.jpg"], height=64, width=48))["image"]
    unturned = image_mapper(True)(record(images["jpeg.jpg"]))["image"]
    assert torch.equal(image, torch.rot90(unturned, -1, (1, 2)))
    with pytest.raises(ImageError, match="is 48 x 64 pixels .* says 64 x 48: correct 'width'"):
        image_mapper(True)(record(images["rotated.jpg"]))


BAD_IMAGES = {
    "missing.png": "does not exist",
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "damaged.png": "broken data stream",
    "empty.png": "not an image",
    "text.jpg": "not an image",
    "bomb.png": "decompression bomb",
    "float.tif": "no known range",
}


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(("name", "reason"), BAD_IMAGES.items())
def test_unreadable_image_is_named(
    images: dict[str, Path], tmp_path: Path, name: str, reason: str, is_train: bool
) -> None:
    with pytest.raises(ImageError, match=reason) as info:
        image_mapper(is_train)(record(tmp_path / name))
    assert info.value.file_name == str(tmp_path / name)
    assert str(info.value).startswith(f"image {tmp_path / name}: ")


def test_another_size_than_stated_is_an_error(images: dict[str, Path]) -> None:
    for is_train in (True, False):
        with pytest.raises(ImageError, match=r"good\.png: it is 64 x 48 .* says 65 x 48"):
            image_mapper(is_train)(record(images["good.png"], width=65))


def test_pages_and_dark_images_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = np.linspace(0, 4095, 48 * 64).astype(np.uint16).reshape(48, 64)
    grey = [Image.new("L", (64, 48), value) for value in (16, 250)]
    for name in "ab":
        Image.fromarray(deep).save(tmp_path / f"dark_{name}.tif")
        grey[0].save(tmp_path / f"pages_{name}.tif", save_all=True, append_images=grey[1:])
        grey[0].save(tmp_path / f"sound_{name}.png")
    log_first_n.__globals__["_LOG_COUNTER"].clear()
    mapper = image_mapper(is_train=True)
    for file in sorted(tmp_path.iterdir()) * 2:
        mapper(record(file))
    dark, pages = (entry.message for entry in caplog.records)
    assert "dark_a.tif" in dark
    assert "15 of 255" in dark
    assert "pages_a.tif" in pages
    assert "2 pages" in pages


@pytest.mark.parametrize(
    "crop", [T.RandomCrop("absolute", (20, 20)), T.FixedSizeCrop((20, 20))], ids=repr
)
def test_a_crop_of_polygons_without_shapely_is_refused_at_the_start(
    crop: T.Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "augmentations": [T.RandomFlip(), crop],
        "image_format": "BGR",
        "use_instance_mask": True,
    }
    MaskRCNNDatasetMapper(is_train=True, **options)
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(ConfigError, match=f"{type(crop).__name__}.*pip install shapely"):
        MaskRCNNDatasetMapper(is_train=True, **options)
    MaskRCNNDatasetMapper(is_train=False, **options)
    MaskRCNNDatasetMapper(is_train=True, **{**options, "use_instance_mask": False})


def test_image_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a: b.jpg", "it is: bad")))
    assert (error.file_name, str(error)) == ("a: b.jpg", "image a: b.jpg: it is: bad")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_stops_at_an_unreadable_image_and_scores_no_other(
    images: dict[str, Path], num_workers: int
) -> None:
    files = ["good.png", "jpeg.jpg", "truncated.jpg", "L.png"]
    loader = build_detection_test_loader(
        dataset=[record(images[name], image_id=i) for i, name in enumerate(files)],
        mapper=image_mapper(is_train=False),
        num_workers=num_workers,
    )
    scored: list[int] = []
    with pytest.raises(ImageError) as info:
        scored.extend(image["image_id"] for batch in loader for image in batch)
    assert scored == [0, 1]
    assert info.value.file_name == str(images["truncated.jpg"])
    message = str(info.value)
    assert message.startswith(f"image {images['truncated.jpg']}: it cannot be decoded (OSError")
    assert "\n" not in message


def test_image_without_instances(tmp_path: Path) -> None:
    instances = mapped(
        tmp_path, [], use_instance_mask=True, use_keypoint=True, keypoint_hflip_indices=FLIP
    )
    assert len(instances) == 0
