"""Annotation files made by hypothesis, sound or broken in one place, through all that reads them.

A file that is sound has no error and loses nothing. One that is broken somewhere ends in a
`UserError` or in numbers, whichever step comes to it: no other exception, no hang, no crash.

The number of broken files is FUZZ_CASES, 2000 by default; sound ones are a tenth of it besides.

    FUZZ_CASES=100000 pytest tests/test_fuzz.py
"""

import copy
import faulthandler
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from mask_rcnn_plugin.config import get_config
from mask_rcnn_plugin.data import coco
from mask_rcnn_plugin.data.check import Checked, check_file, clean
from mask_rcnn_plugin.data.check.findings import total
from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.data.mapper import MaskRCNNDatasetMapper
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator
from mask_rcnn_plugin.fast.mask_rle import RLEMasks

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
FUZZ: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}

KEYPOINTS = ["nose", "left_hand", "right_hand"]
CATEGORIES = [
    {
        "id": 1,
        "name": "person",
        "keypoints": KEYPOINTS,
        "skeleton": [[1, 2], [1, 3]],
        "keypoint_sigmas": [0.1, 0.1, 0.1],
    },
    {"id": 7, "name": "ball"},
]
WIDTH, HEIGHT = 48, 40
SOUND_FILES = ["rgb.png", "gray.png", "cmyk.jpg", "16-bit.png", "turned.jpg"]
BROKEN_FILES = ["missing.png", "truncated.png", "truncated.jpg", "empty.png", "text.png", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of WIDTH x HEIGHT, and files that are none."""
    folder = tmp_path_factory.mktemp("fuzz")
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(folder / "rgb.png")
    image.convert("L").save(folder / "gray.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 256).save(folder / "16-bit.png")
    exif = Image.Exif()
    exif[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    for suffix, source in (("png", "rgb.png"), ("jpg", "cmyk.jpg")):
        whole = (folder / source).read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Box, mask and keypoint branch on a ResNet-10-FPN of a few channels."""
    cfg = get_config(
        "table5_multitask/keypoint_and_mask+synthetic",
        [
            "model.backbone.name=ResNet-10-FPN",
            "model.backbone.width=8",
            "model.backbone.fpn_channels=8",
            "model.proposal_generator.batch_size_per_image=16",
            "model.proposal_generator.pre_nms_topk=[20,20]",
            "model.proposal_generator.post_nms_topk=[8,8]",
            "model.roi_heads.batch_size_per_image=4",
            f"model.roi_heads.num_classes={len(CATEGORIES)}",
            f"model.roi_heads.keypoint_head.num_keypoints={len(KEYPOINTS)}",
            "model.roi_heads.box_head.fc_dims=[8,8]",
            "model.roi_heads.mask_head.conv_dims=[8]",
            "model.roi_heads.keypoint_head.conv_dims=[8]",
        ],
    )
    torch.manual_seed(0)
    return instantiate(cfg.model).train()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings and tables of results are of no use."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@st.composite
def sound_files(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a COCO file."""
    images = [
        {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(
            draw(st.lists(st.sampled_from(SOUND_FILES), min_size=1, max_size=2)), start=3
        )
    ]
    annotations = [
        draw(sound_annotations(i, draw(st.sampled_from(images))["id"]))
        for i in range(1, 1 + draw(st.integers(0, 3)))
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


@st.composite
def sound_annotations(draw: st.DrawFn, identity: int, image_id: int) -> dict[str, Any]:
    x, y = draw(st.integers(0, WIDTH - 6)), draw(st.integers(0, HEIGHT - 6))
    w, h = draw(st.integers(5, WIDTH - x)), draw(st.integers(5, HEIGHT - y))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    kind = draw(st.sampled_from(["polygon", "polygons", "compressed", "counts", "crowd"]))
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h + 0.0]
    segmentation: Any = {"size": [HEIGHT, WIDTH]}
    if kind.startswith("polygon"):
        triangle = [x + 1.5, y, x + w, y + 2, x, y + h]
        segmentation = [polygon] if kind == "polygon" else [polygon, triangle]
    elif kind == "compressed":
        segmentation["counts"] = coco_mask.encode(mask)["counts"].decode()
    else:
        flat = mask.reshape(-1, order="F")
        steps = np.flatnonzero(np.diff(flat, prepend=0, append=0))
        ends = [0, *steps.tolist(), HEIGHT * WIDTH]
        segmentation["counts"] = [b - a for a, b in pairwise(ends)]
    person = draw(st.booleans())
    annotation = {
        "id": identity,
        "image_id": image_id,
        "category_id": 1 if person else 7,
        "bbox": [x, y, w, h + 0.0],
        "area": w * h,
        "iscrowd": int(kind == "crowd"),
        "segmentation": segmentation,
    }
    if person and draw(st.booleans()):
        annotation["keypoints"] = [x, y, 2, x + w // 2, y + h // 2, 1, 0, 0, 0]
        annotation["num_keypoints"] = 2
    return annotation


DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
# Any JSON value in any place; NaN and infinities are what Python's json reads and writes.
JUNK = [
    *(None, True, False, "", "x", "7", "\0", "../x.png", "é" * 300),
    *(0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e6, 1e38, 1e39, 1e308, -1e308),
    *(2**31, 2**32, 2**63, 2**64, -(2**63), 10**400, math.nan, math.inf, -math.inf),
    *([], {}, [[]], [{}], [None], ["x"], [1], [1, 2], [[1, 2, 3, 4]], {"id": 1}, {"size": 1}, DEEP),
    *([0] * 4, [1] * 17, [math.nan] * 6, [1e308] * 6, [[1e308] * 6], [[math.nan] * 6]),
    {"size": [HEIGHT, WIDTH], "counts": "\xff" * 9},
    {"size": [HEIGHT, WIDTH], "counts": "ooooooooooooooo"},
    {"size": [HEIGHT, WIDTH], "counts": [2**32 - 1] * 3},
    {"size": [2**31, 2**31], "counts": "0"},
    {"size": [0, 0], "counts": []},
]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys and indices that lead to each value within a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    return [place, *(p for key in keys for p in places(value[key], (*place, key)))]


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A sound file with something else in one place."""
    content = copy.deepcopy(draw(sound_files()))
    if draw(st.integers(0, 30)) == 7:
        text = json.dumps(content).encode()
        cut = text[: draw(st.integers(0, len(text) - 1))]
        junk = json.dumps(draw(st.sampled_from(JUNK))).encode()
        return draw(st.sampled_from([cut, junk, b"[" * 100_000, b"\xef\xbb\xbf" + text, b"\xff"]))
    # Each kind of place as often as another, not each coordinate as often as the whole file.
    kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for place in places(content)[1:]:
        kinds.setdefault(tuple(k if isinstance(k, str) else 0 for k in place), []).append(place)
    *path, last = draw(st.sampled_from(draw(st.sampled_from(list(kinds.values())))))
    parent = content
    for key in path:
        parent = parent[key]
    if draw(st.integers(0, 9)) == 7:
        del parent[last]
    else:
        parent[last] = draw(
            st.sampled_from(BROKEN_FILES if last == "file_name" else JUNK)
            | other_values(parent[last])
        )
    return json.dumps(content).encode()


@st.composite
def other_values(draw: st.DrawFn, value: Any) -> Any:
    """Something like the value, but not as it was."""
    if isinstance(value, int | float):
        return draw(st.sampled_from([-value, value + 1, value * 1000, str(value), [value]]))
    if isinstance(value, dict):
        return draw(st.sampled_from([[value], list(value), {**value, "size": [WIDTH, HEIGHT]}]))
    middle = draw(st.integers(0, len(value)))
    ways = [value[:middle], value[middle:], value + value, value[::-1], [value]]
    if isinstance(value, str):
        ways += [value[:middle] + draw(st.characters()) + value[middle + 1 :]] * 3
    return draw(st.sampled_from(ways))


def predictions(count_classes: int) -> Instances:
    """Two, of which one fits many annotations well."""
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, WIDTH, HEIGHT], [1, 2, 9, 9]]))
    instances.scores = torch.tensor([0.9, 0.5])
    instances.pred_classes = torch.tensor([0, count_classes - 1])
    masks = np.ones((HEIGHT, WIDTH, 2), np.uint8, order="F")
    masks[:, 9:, 1] = 0
    rles = coco_mask.encode(masks)
    instances.pred_masks = RLEMasks([{**r, "counts": r["counts"].decode()} for r in rles])
    instances.pred_keypoints = torch.ones(2, len(KEYPOINTS), 3)
    return instances


@contextmanager
def no_hang() -> Iterator[None]:
    """End the process where the block takes 5 minutes, in compiled code too, and say where."""
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Pipeline:
    """All that reads an annotation file, in the order of a training and an evaluation."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self.model = folder, model
        self.values = list(model.state_dict().values())
        self.weights = [value.clone() for value in self.values]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=1e-4)
        self.file = folder / "annotations.json"
        self.passed: Counter[str] = Counter()

    def check(self, content: bytes) -> bool:
        """Whether the check finds no error; where it does, its copy without errors has none."""
        self.file.write_bytes(content)
        checked, sound = self.checked(self.file)
        if not sound:
            copy = self.file.with_name("clean.json")
            try:
                clean(checked, copy)
            except UserError:
                return False
            assert self.checked(copy)[1]
            self.run(copy.read_bytes())
            self.passed["cleaned"] += 1
        return sound

    def checked(self, file: Path) -> tuple[Checked, bool]:
        train, test = (
            check_file(
                *(str(file), str(self.folder)),
                training=training,
                needs_mask=True,
                open_images=training,
            )
            for training in (True, False)
        )
        return train, not total([train.findings, test.findings], "error")

    def run(self, content: bytes) -> dict[str, Any]:
        """What came of it: "instances" trained on, "results" of the evaluation.

        Raises:
            UserError: from the first step that cannot go on.
        """
        self.file.write_bytes(content)
        name = register_coco_dataset(str(self.file), str(self.folder))
        records = DatasetCatalog.get(name)
        self.passed["loaded"] += 1
        if (fast := coco._records(name, str(self.folder))) is not None:
            stock = load_coco_json(name, str(self.folder), name, extra_annotation_keys=["id"])
            assert records == fast == stock
            self.passed["loaded fast"] += 1
        return {"instances": self.train(name, records), "results": self.evaluate(name, records)}

    def train(self, name: str, records: list[dict[str, Any]]) -> int:
        same_model = MetadataCatalog.get(name).get("keypoint_names") == KEYPOINTS
        mapper = MaskRCNNDatasetMapper(
            is_train=True,
            augmentations=[T.ResizeShortestEdge([HEIGHT, HEIGHT + 16]), T.RandomFlip()],
            image_format="BGR",
            use_instance_mask=True,
            use_keypoint=same_model,
            keypoint_hflip_indices=[0, 2, 1] if same_model else None,
        )
        batch = []
        for record in records:
            try:
                batch.append(mapper(record))
            except UserError:  # the loader leaves out the image
                self.passed["bad images"] += 1
        if batch and same_model:
            torch.manual_seed(0)
            with torch.no_grad():
                torch._foreach_copy_(self.values, self.weights)
            self.optimizer.zero_grad()
            with EventStorage():
                loss = sum(self.model(batch).values())
            loss.backward()
            self.optimizer.step()
            assert loss.isfinite()
            assert torch.cat([value.flatten() for value in self.values]).isfinite().all()
            self.passed["trained"] += 1
        return sum(len(image["instances"]) for image in batch)

    def evaluate(self, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
        metadata = MetadataCatalog.get(name)
        tasks = ["bbox", "segm"]
        if metadata.get("keypoint_names") == KEYPOINTS and metadata.get("keypoint_oks_sigmas"):
            tasks.append("keypoints")
        evaluator = MaskRCNNCOCOEvaluator(name, tuple(tasks), distributed=False)
        mapper = MaskRCNNDatasetMapper(is_train=False, augmentations=[], image_format="BGR")
        evaluator.reset()
        for record in records:
            output = predictions(len(metadata.thing_classes))
            evaluator.process([mapper(record)], [{"instances": output}])
        results = evaluator.evaluate()
        self.passed["scored"] += bool(results)
        return results


def test_sound_files_lose_nothing(folder: Path, model: nn.Module) -> None:
    pipeline = Pipeline(folder, model)

    @settings(max_examples=CASES // 10, **FUZZ)
    @given(sound_files())
    def run(content: dict[str, Any]) -> None:
        with no_hang():
            text = json.dumps(content).encode()
            assert pipeline.check(text) or all(a["iscrowd"] for a in content["annotations"])
            outcome = pipeline.run(text)
        assert outcome["instances"] == sum(not a["iscrowd"] for a in content["annotations"])
        assert outcome["results"].keys() == {"bbox", "segm", "keypoints"}

    run()
    assert pipeline.passed["scored"] >= CASES // 10


def test_files_broken_in_one_place_end_in_an_error_or_in_numbers(
    folder: Path, model: nn.Module
) -> None:
    pipeline = Pipeline(folder, model)

    @settings(max_examples=CASES, **FUZZ)
    @given(broken_files())
    def run(content: bytes) -> None:
        pipeline.passed["cases"] += 1
        with no_hang():
            sound = pipeline.check(content)
            try:
                pipeline.run(content)
            except UserError:
                assert not sound
                pipeline.passed["refused"] += 1

    run()
    assert pipeline.passed["cases"] >= CASES
    # Or the files would be broken beyond what the later steps see.
    assert pipeline.passed["loaded fast"] > CASES // 10
    assert pipeline.passed["trained"] > CASES // 10
    assert pipeline.passed["scored"] > CASES // 10
    assert pipeline.passed["refused"] > CASES // 10
    assert pipeline.passed["cleaned"] > CASES // 10
