"""Each kind of finding: a clean file, broken in one place, gives that one and no other."""

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_util

from mask_rcnn_plugin.data.annotation_file import keep_decoded, kept_document
from mask_rcnn_plugin.data.check import KINDS, Checked, check_file, clean, compare
from mask_rcnn_plugin.data.check.images import missing
from mask_rcnn_plugin.data.coco import DatasetError

WIDTH, HEIGHT = 40, 30
NAN = float("nan")
Document = dict[str, Any]
Break = Callable[[Document, Path], None]


def rectangle(x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
    """An annotation's box, area and mask."""
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    area = (x1 - x0) * (y1 - y0)
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "segmentation": [polygon]}


def rle(x0: int, y0: int, x1: int, y1: int, *, compressed: bool) -> dict[str, Any]:
    """The same as run lengths."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    flat = np.concatenate([[0], mask.ravel(order="F")])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]])
    found = {"size": [HEIGHT, WIDTH], "counts": np.diff(starts).tolist()}
    if compressed:
        counts = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
        found = {"size": [HEIGHT, WIDTH], "counts": counts}
    return {**rectangle(x0, y0, x1, y1), "segmentation": found}


def clean_document() -> Document:
    """Two images of polygons, one of them with keypoints; one image of run lengths."""
    keypoints = {"keypoints": [12, 12, 2, 0, 0, 0], "num_keypoints": 1}
    annotations = [
        {"image_id": 1, "category_id": 1, **rectangle(10, 10, 30, 25), **keypoints},
        {"image_id": 2, "category_id": 7, **rectangle(0, 0, 40, 30)},
        {"image_id": 3, "category_id": 7, **rle(5, 5, 20, 30, compressed=True)},
        {"image_id": 3, "category_id": 7, **rle(5, 5, 20, 15, compressed=False)},
        {"image_id": 2, "category_id": 1, **rectangle(10, 10, 30, 25), **keypoints},
    ]
    return {
        "info": {"year": 2017},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)
        ],
        "annotations": [{"id": i, "iscrowd": 0, **a} for i, a in enumerate(annotations, 11)],
        "categories": [
            {"id": 1, "name": "person", "keypoints": ["head", "foot"]},
            {"id": 7, "name": "ball"},
        ],
    }


def write(folder: Path, document: object) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (WIDTH, HEIGHT), "white").save(folder / "images" / name)
    file = folder / "a.json"
    file.write_text(json.dumps(document))
    return file


def check(file: Path, **options: Any) -> Checked:
    return check_file(str(file), str(file.parent / "images"), **options)


def annotation(index: int = 0, **changes: Any) -> Break:
    return lambda document, _: document["annotations"][index].update(changes)


def image(index: int = 0, **changes: Any) -> Break:
    return lambda document, _: document["images"][index].update(changes)


def category(index: int = 0, **changes: Any) -> Break:
    return lambda document, _: document["categories"][index].update(changes)


def without(part: str, index: int, key: str) -> Break:
    return lambda document, _: document[part][index].pop(key)


def replaced(part: str, value: Any) -> Break:
    return lambda document, _: document.__setitem__(part, value)


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), turn: int = 0) -> Break:
    """Replace 1.png after all is written."""

    def replace(_: Document, folder: Path) -> None:
        exif = Image.Exif()
        if turn:
            exif[274] = turn
        file = folder / "images" / "1.png"
        white = {"I;16": 65535, "F": 1.0, "CMYK": (0, 0, 0, 0)}.get(mode, "white")
        kind = {"CMYK": "jpeg", "F": "tiff"}.get(mode, "png")
        Image.new(mode, size, white).save(file, kind, exif=exif)

    return replace


def pages(kind: str) -> Break:
    """An image of several, none of them dark."""

    def replace(_: Document, folder: Path) -> None:
        first, *others = (Image.new("L", (WIDTH, HEIGHT), value) for value in (250, 130, 60, 20))
        file = folder / "images" / "1.png"
        first.save(file, kind, save_all=True, append_images=others)

    return replace


def grey(dtype: Any, brightest: int) -> Break:
    def replace(_: Document, folder: Path) -> None:
        values = np.linspace(0, brightest, WIDTH * HEIGHT).astype(dtype).reshape(HEIGHT, WIDTH)
        Image.fromarray(values).save(folder / "images" / "1.png", "png")

    return replace


def truncated(_: Document, folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    file = folder / "images" / "1.png"
    Image.fromarray(noise).save(file, "jpeg")
    file.write_bytes(file.read_bytes()[:-400])


CASES: list[tuple[str, Break]] = [
    ("no-image", replaced("images", [])),
    ("no-annotation", replaced("annotations", [])),
    ("not-coco", replaced("categories", [])),
    ("not-coco", replaced("images", {"1": "a.jpg"})),
    ("not-coco", lambda document, _: document.pop("categories")),
    ("not-standard-json", replaced("info", {"year": NAN, "text": "NaN, Infinity"})),
    ("category-format", category(1, name=None)),
    ("category-format", category(1, id="7")),
    ("category-format", category(1, keypoints="head")),
    ("category-id-duplicate", lambda d, _: d["categories"].append({"id": 7, "name": "b"})),
    ("category-name-duplicate", category(1, name="person")),
    ("category-keypoints", category(1, keypoints=["valve"])),
    ("category-skeleton", category(0, skeleton=[[1, 3]])),
    ("category-skeleton", category(0, skeleton={"head": "foot"})),
    ("keypoint-unpaired", category(0, keypoints=["left_eye", "tail"])),
    ("category-unused", lambda d, _: d["categories"].append({"id": 9, "name": "dog"})),
    ("image-format", image(id=None)),
    ("image-format", image(width=True)),
    ("image-format", image(height=30.5)),
    ("image-format", image(id=1e30)),
    ("image-format", image(file_name="")),
    ("image-format", lambda d, _: d["images"].append(["4.png"])),
    ("image-id-duplicate", lambda d, _: d["images"].append(dict(d["images"][0]))),
    ("file-name-duplicate", image(1, file_name="1.png")),
    ("image-no-annotation", lambda d, _: d["annotations"].pop(0)),
    ("image-missing", image(file_name="no.png")),
    ("image-missing", image(file_name="folder/\0.png")),
    ("image-unreadable", truncated),
    ("image-unreadable", lambda _, f: (f / "images" / "1.png").write_text("no image")),
    ("image-size", picture(size=(WIDTH, HEIGHT + 1))),
    ("image-rotated-size", picture(turn=6)),
    ("image-rotated", picture(turn=8, size=(HEIGHT, WIDTH))),
    ("image-rotated", picture(turn=3)),
    ("image-16-bit", picture("I;16")),
    ("image-depth", picture("F")),
    ("image-alpha", picture("RGBA")),
    ("image-cmyk", picture("CMYK")),
    ("image-pages", pages("tiff")),
    ("image-pages", pages("gif")),
    ("image-dark", grey(np.uint8, 15)),
    ("image-dark", grey(np.uint16, 4095)),  # 12 bits, the largest value
    ("image-dark", grey(np.uint16, 16383)),
    ("annotation-format", lambda d, _: d["annotations"].append(None)),
    ("annotation-format", lambda d, _: d["annotations"].append({**d["annotations"][0], "id": "x"})),
    ("annotation-format", lambda d, _: d["annotations"].append({"id": 99})),
    ("annotation-id-missing", without("annotations", 0, "id")),
    ("annotation-id-missing", annotation(2, id=None)),
    ("annotation-id-duplicate", annotation(id=12)),
    ("annotation-id-zero", annotation(id=0)),
    ("unknown-image", lambda d, _: d["annotations"].append({**d["annotations"][0], "image_id": 9})),
    ("unknown-category", annotation(2, category_id=8)),
    ("ignore-set", annotation(ignore=1)),
    ("iscrowd-format", annotation(2, iscrowd=2)),
    ("iscrowd-format", annotation(2, iscrowd="0")),
    ("crowd", annotation(2, iscrowd=1)),
    ("non-finite", annotation(bbox=[10, NAN, 20, 15])),
    ("non-finite", annotation(1, segmentation=[[0, 0, 40, 0, NAN, 30]])),
    ("box-missing", without("annotations", 0, "bbox")),
    ("box-format", annotation(bbox=["10", 10, 20, 15])),
    ("box-negative", annotation(bbox=[30, 25, -20, -15])),
    ("box-empty", annotation(bbox=[10, 10, 20, 0])),
    ("box-outside", annotation(bbox=[40, 10, 20, 15])),
    ("box-partly-outside", annotation(1, bbox=[0, 0, 42, 30])),
    ("box-small", annotation(bbox=[10, 10, 0.5, 15], segmentation=None)),
    ("mask-mixed", annotation(segmentation=[])),
    ("mask-format", annotation(segmentation="polygon")),
    ("mask-empty", annotation(2, segmentation={"size": [30, 40], "counts": [1200]})),
    ("polygon-format", annotation(segmentation=[10, 10, 30, 10, 30, 25])),
    ("polygon-short", annotation(segmentation=[[10, 10, 30, 25]])),
    ("polygon-odd", annotation(segmentation=[[10, 10, 30, 10, 30, 25, 3]])),
    (
        "polygon-dropped",
        annotation(segmentation=[[10, 10], *rectangle(10, 10, 30, 25)["segmentation"]]),
    ),
    ("polygon-outside", annotation(segmentation=[[50, 10, 60, 10, 60, 25]])),
    ("mask-partly-outside", annotation(1, segmentation=[[0, 0, 43, 0, 43, 30, 0, 30]])),
    ("rle-format", annotation(2, segmentation={"size": [30, 40], "counts": "\x7f"})),
    ("rle-size", annotation(2, segmentation={"size": [40, 30], "counts": [1000, 200]})),
    ("rle-sum", annotation(2, segmentation={"size": [30, 40], "counts": [1000, 201]})),
    ("area-missing", without("annotations", 0, "area")),
    ("area-format", annotation(area="300")),
    ("area-format", annotation(area=NAN)),
    ("area-contradicts", annotation(area=400)),
    ("area-contradicts", annotation(2, area=1)),
    ("box-contradicts", annotation(bbox=[10, 10, 24, 15])),
    ("box-contradicts", annotation(2, bbox=[5, 5, 15, 20])),
    ("keypoint-format", annotation(keypoints={"head": [12, 12]})),
    ("keypoint-format", annotation(keypoints=[12, NAN, 2, 0, 0, 0])),
    ("keypoint-count", annotation(keypoints=[12, 12, 2])),
    ("keypoint-visibility", annotation(keypoints=[12, 12, 0.9, 0, 0, 0])),
    ("keypoint-outside", annotation(keypoints=[12, 12, 2, 45, 10, 1], num_keypoints=2)),
    ("num-keypoints", annotation(num_keypoints=2)),
    (
        "keypoint-none",
        lambda d, _: [
            d["annotations"][i].update(keypoints=[0] * 6, num_keypoints=0) for i in (0, 4)
        ],
    ),
]
# What a break brings with it: the file is the less for it.
BESIDES = {
    "no-image": {"unknown-image", "category-unused", "keypoint-none"},
    "category-format": {"unknown-category"},
    "image-format": {"unknown-image"},
    "non-finite": {"not-standard-json"},
    "area-format": {"not-standard-json"},
    "keypoint-format": {"not-standard-json"},
    "box-small": {"mask-mixed"},
    "image-dark": {"image-16-bit"},
}


def broken(folder: Path, breaking: Break) -> Path:
    document = clean_document()
    write(folder, document)
    breaking(document, folder)
    file = folder / "a.json"
    file.write_text(json.dumps(document))
    return file


def test_a_clean_file(tmp_path: Path) -> None:
    checked = check(write(tmp_path, clean_document()), needs_mask=True)
    assert checked.findings == {}
    assert checked.findings.table() == "no problems found"
    assert checked.classes == ["person", "ball"]
    assert checked.keypoints == ["head", "foot"]


@pytest.mark.parametrize(("kind", "breaking"), CASES)
def test_one_break_one_finding(tmp_path: Path, kind: str, breaking: Break) -> None:
    findings = check(broken(tmp_path, breaking)).findings
    assert kind in findings
    assert findings.keys() - {kind} <= BESIDES.get(kind, set()), findings.table()
    assert KINDS[kind].meaning[:20] in findings.table()


def test_each_kind_has_a_test() -> None:
    elsewhere = {
        *("not-readable", "not-json", "no-test-annotation", "mask-missing", "crowd-polygon"),
        *(
            "keypoint-missing",
            "keypoint-other",
            "classes-differ",
            "keypoints-differ",
            "num-classes",
        ),
        *("no-keypoints", "leak", "detections-limited", "mostly-crowds", "refused", "not-checked"),
        *("box-xyxy", "category-heading", "image-too-large"),
    }
    assert {kind for kind, _ in CASES} | elsewhere == set(KINDS)


@pytest.mark.parametrize(
    "change",
    [
        image(width=40.0, height=30.0),
        lambda d, _: [
            entry.update({key: float(entry[key])})
            for part in ("images", "annotations", "categories")
            for entry in d[part]
            for key in ("id", "image_id", "category_id", "iscrowd")
            if key in entry
        ],
        annotation(iscrowd=None),
        annotation(iscrowd=False),
        without("annotations", 0, "num_keypoints"),  # counted, and so scored
        grey(np.uint8, 16),
        grey(np.uint8, 255),
    ],
)
def test_what_has_one_meaning_is_no_finding(tmp_path: Path, change: Break) -> None:
    checked = check(broken(tmp_path, change), needs_mask=True)
    assert checked.findings == {}
    assert not clean(checked, tmp_path / "out.json")
    assert check(tmp_path / "out.json").findings == {}


def test_16_bits_of_the_whole_range_are_not_dark(tmp_path: Path) -> None:
    for brightest in (16384, 65535):
        assert check(broken(tmp_path, grey(np.uint16, brightest))).findings.keys() == {
            "image-16-bit"
        }


def test_a_camera_picture_with_its_preview_is_one_page(tmp_path: Path) -> None:
    """MPO, as phones write it."""
    assert check(broken(tmp_path, pages("mpo"))).findings == {}


def test_an_image_that_pillow_refuses_for_its_size_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, clean_document())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    findings = check(file).findings
    assert findings.keys() == {"image-too-large"}
    assert f"{WIDTH * HEIGHT - 2}" in findings["image-too-large"].example


def as_corners(document: Document, number: int = 5) -> None:
    for entry in document["annotations"][:number]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]


def test_boxes_are_corners_where_the_masks_say_so(tmp_path: Path) -> None:
    document = clean_document()
    as_corners(document)
    checked = check(write(tmp_path, document))
    assert checked.findings.keys() == {"box-xyxy"}
    assert checked.findings["box-xyxy"].count == 4  # one stands at the origin: the same numbers
    assert clean(checked, tmp_path / "out.json") == {"repaired: box-xyxy": 4}
    assert json.loads((tmp_path / "out.json").read_text()) == clean_document()


def test_a_few_such_boxes_may_be_of_the_whole_object(tmp_path: Path) -> None:
    document = clean_document()
    as_corners(document, 1)
    checked = check(write(tmp_path, document))
    assert checked.findings.keys() == {"box-contradicts"}
    assert not clean(checked, tmp_path / "out.json")


def test_boxes_that_leave_the_image_are_asked_about(tmp_path: Path) -> None:
    document = clean_document()
    as_corners(document)
    for entry in document["annotations"]:
        entry["segmentation"] = None
    found = check(write(tmp_path, document)).findings["box-partly-outside"]
    assert (found.count, "x1, y1, x2, y2" in found.example) == (3, True)


def test_run_lengths_that_equal_integers_become_integers(tmp_path: Path) -> None:
    document = clean_document()
    whole = document["annotations"][3]["segmentation"]
    document["annotations"][3]["segmentation"] = {k: [float(n) for n in whole[k]] for k in whole}
    checked = check(write(tmp_path, document))
    assert checked.findings.keys() == {"rle-format"}  # pycocotools refuses them
    assert clean(checked, tmp_path / "out.json") == {"repaired: rle-format": 1}
    assert (tmp_path / "out.json").read_text().replace(" ", "") == json.dumps(
        clean_document(), separators=(",", ":")
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_heading_of_other_categories_is_told_and_dropped(
    tmp_path: Path, training: bool
) -> None:
    """Roboflow's exports have such a category."""
    document = clean_document()
    for entry in document["categories"]:
        entry["supercategory"] = "things"
    whole = json.loads(json.dumps(document))
    document["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    checked = check(write(tmp_path, document), training=training)
    assert checked.findings["category-heading"].first == ["0"]
    assert clean(checked, tmp_path / "out.json") == {"dropped: category": 1}
    assert json.loads((tmp_path / "out.json").read_text()) == whole
    document["annotations"][0]["category_id"] = 0  # a class as others
    assert "category-heading" not in check(write(tmp_path, document), training=training).findings


# What could still be wrong


def test_what_is_no_coco_file(tmp_path: Path) -> None:
    file = write(tmp_path, clean_document())
    whole = file.read_bytes()
    assert check(tmp_path / "no.json").findings.keys() == {"not-readable"}
    assert check(tmp_path).findings.keys() == {"not-readable"}
    for content, words in (
        (b"", "empty"),
        (whole[:-200], "line 1 column"),
        (whole + b"]", "line 1 column"),
        (whole.replace(b'"info"', b"info"), "line 1 column 2"),
        (b"\xef\xbb\xbf" + whole, "BOM"),
        (whole.replace(b"ball", b"b\xe4ll"), "0xe4"),
        (b'{"images": ' + b"[" * 10**6, "recursion"),
    ):
        file.write_bytes(content)
        findings = check(file).findings
        assert findings.keys() == {"not-json"}
        assert words in findings["not-json"].example
        assert check(file).size() == "not read"
    for content in (b"[]", b"null", b'"a"', b"3"):
        file.write_bytes(content)
        assert check(file).findings.keys() == {"not-coco"}


def test_non_ascii_names_are_read(tmp_path: Path) -> None:
    document = clean_document()
    document["categories"][1]["name"] = "мяч"
    file = write(tmp_path, {})
    file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    checked = check(file)
    assert checked.findings == {}
    assert checked.classes == ["person", "мяч"]


@pytest.mark.parametrize(("_", "breaking"), CASES)
def test_a_file_that_only_python_reads_is_checked_and_cleaned_alike(
    tmp_path: Path, _: str, breaking: Break
) -> None:
    """NaN anywhere takes the file to Python's slower reader."""
    results = []
    for year in (2017, NAN):
        file, out = broken(tmp_path, breaking), tmp_path / "out.json"
        document = json.loads(file.read_text())
        document["info"]["year"] = year
        file.write_text(json.dumps(document))
        checked = check(file)
        try:
            done: object = clean(checked, out)
        except DatasetError as error:
            done = str(error)
        checked.findings.pop("not-standard-json", None)
        kept = json.loads(out.read_text())["annotations"] if out.exists() else None
        results.append((checked.findings, done, kept))
    assert results[0] == results[1]


@pytest.mark.parametrize("number", ["1e999", "1" * 5000, '"\\ud800"'])
def test_an_area_that_only_python_reads(tmp_path: Path, number: str) -> None:
    file = broken(tmp_path, annotation(1, area="AREA"))
    file.write_text(file.read_text().replace('"AREA"', number))
    kind = "not-json" if number.startswith("11") else "area-format"
    assert check(file).findings.keys() == {kind}


@pytest.mark.parametrize(("_", "breaking"), CASES)
def test_a_file_that_is_kept_is_checked_alike(tmp_path: Path, _: str, breaking: Break) -> None:
    file = str(broken(tmp_path, breaking))
    checked = check(Path(file))
    keep_decoded(True)
    try:
        kept_document(file, decode=True)
        again = check(Path(file))
    finally:
        keep_decoded(False)
    assert again.findings == checked.findings
    assert (again.objects, again.flagged) == (checked.objects, checked.flagged)


def test_annotations_do_not_stand_decoded_in_memory(tmp_path: Path) -> None:
    document = clean_document()
    document["annotations"] = [
        {**document["annotations"][0], "id": index} for index in range(1, 20_000)
    ]
    file = write(tmp_path, document)
    tracemalloc.start()
    try:
        checked = check(file, open_images=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * file.stat().st_size
    assert checked.size() == "3 images, 19999 annotations, 2 categories"


def test_first_ids_and_counts(tmp_path: Path) -> None:
    document = clean_document()
    document["annotations"] += [
        {**document["annotations"][1], "id": 100 + i, "bbox": [50, 0, 9, 9]} for i in range(7)
    ]
    findings = check(write(tmp_path, document)).findings
    assert findings["box-outside"].count == 7
    assert findings["box-outside"].first == ["100", "101", "102", "103", "104"]
    assert re.search(r"annotation 100, 101, 102, 103,\s", findings.table())
    assert re.search(r"104, \.\.\.\s", findings.table())
    assert findings.count("error") == 7


def test_errors_stand_first(tmp_path: Path) -> None:
    file = broken(tmp_path, annotation(area=400))
    document = json.loads(file.read_text())
    document["annotations"][1]["bbox"] = [50, 0, 9, 9]
    document["annotations"][2]["iscrowd"] = 1
    table = check(write(tmp_path, document)).findings.table()
    assert table.index("box-outside") < table.index("area-contradicts") < table.index("crowd")


def test_what_the_model_and_the_use_of_the_set_ask_for(tmp_path: Path) -> None:
    file = broken(tmp_path, annotation(segmentation=None))
    assert check(file, needs_mask=True).findings.keys() == {"mask-missing"}
    file = broken(tmp_path, without("annotations", 0, "area"))
    assert check(file).findings.count("error") == 0
    assert check(file, training=False).findings.count("error") == 1  # COCO's evaluation reads it
    file = broken(tmp_path, replaced("annotations", []))
    assert check(file, training=False).findings.keys() == {"no-test-annotation"}
    file = broken(tmp_path, lambda document, _: document.pop("annotations"))
    assert check(file, training=False).findings.keys() == {"no-test-annotation"}


def test_crowds_and_persons_without_keypoints(tmp_path: Path) -> None:
    file = broken(tmp_path, annotation(iscrowd=1))
    assert check(file).findings.keys() == {"crowd", "crowd-polygon"}
    file = broken(tmp_path, without("annotations", 0, "keypoints"))
    assert check(file).findings.keys() == {"keypoint-missing"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("crowds", "told"), [(2, False), (3, True), (5, True)])
def test_more_crowds_than_objects_are_told(
    crowds: int, told: bool, training: bool, tmp_path: Path
) -> None:
    """As masks that are drawn with a brush are exported by some programs."""
    document = clean_document()
    for found in document["annotations"][:crowds]:
        found["iscrowd"] = 1
    findings = check(write(tmp_path, document), training=training).findings
    assert ("mostly-crowds" in findings) == told
    if told:
        assert findings["mostly-crowds"].example == f"{crowds} of 5 annotations"


@pytest.mark.parametrize("change", [{"iscrowd": 1}, {"bbox": [5, 5, 0, 5], "segmentation": None}])
def test_nothing_to_train_on(tmp_path: Path, change: dict[str, Any]) -> None:
    document = clean_document()
    for entry in document["annotations"]:
        entry |= change
    checked = check(write(tmp_path, document))
    assert checked.findings["no-annotation"].count == checked.findings.count("error") == 1
    with pytest.raises(DatasetError, match="a.json has no valid annotation"):
        clean(checked, tmp_path / "out.json")
    scored = check(tmp_path / "a.json", training=False).findings
    assert ("no-test-annotation" in scored) == ("iscrowd" in change)
    document["annotations"][3] = clean_document()["annotations"][3]
    assert "no-annotation" not in check(write(tmp_path, document)).findings


def test_repeated_ids_in_a_minival_file_are_cocos_own(tmp_path: Path) -> None:
    file = broken(tmp_path, annotation(id=12)).rename(tmp_path / "minival.json")
    assert check(file).findings["annotation-id-duplicate"].severity == "warning"


def test_overlapping_polygons_count_once(tmp_path: Path) -> None:
    twice = rectangle(10, 10, 30, 25)["segmentation"] * 2
    assert check(broken(tmp_path, annotation(segmentation=twice))).findings == {}


def test_images_may_stay_closed(tmp_path: Path) -> None:
    file = broken(tmp_path, picture("L", (3, 3)))
    assert check(file, open_images=False).findings == {}
    (tmp_path / "images" / "1.png").unlink()
    assert check(file, open_images=False).findings.keys() == {"image-missing"}


@pytest.mark.parametrize("how", ["loop", "dangling", "pipe"])
def test_what_is_no_file_is_missing_and_the_others_are_there(tmp_path: Path, how: str) -> None:
    file = write(tmp_path, clean_document())
    first = tmp_path / "images" / "1.png"
    first.unlink()
    if how == "pipe":
        os.mkfifo(first)
    else:
        first.symlink_to(first.name if how == "loop" else "nothing.png")
    (tmp_path / "images" / "2.png").rename(tmp_path / "2.png")
    (tmp_path / "images" / "2.png").symlink_to(tmp_path / "2.png")
    found = check(file).findings
    assert found.keys() == {"image-missing"}
    assert found["image-missing"].first == ["1"]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from([*clean_document(), "id", "file_name", "bbox"]), inner
            )
        ),
        max_leaves=15,
    )
)
def test_any_json_gives_findings(tmp_path: Path, value: object) -> None:
    file = write(tmp_path, value)
    checked = check(file, open_images=False)
    assert checked.findings.count("error") > 0
    with pytest.raises(DatasetError):
        clean(checked, tmp_path / "out.json")


PLACES = [
    (part, index, key)
    for part, entries in clean_document().items()
    if isinstance(entries, list)
    for index, entry in enumerate(entries)
    for key in entry
]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2, 10**6, 10**20, 10**400, 1e308, NAN, float("inf")])
    | st.floats(-50, 50)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=8),
    max_leaves=20,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=3), st.booleans()
)
def test_a_cleaned_copy_has_no_errors(
    tmp_path: Path, changes: list[tuple[tuple[str, int, str], Any]], training: bool
) -> None:
    document = clean_document()
    for (part, index, key), value in changes:
        document[part][index][key] = value
    file = write(tmp_path, document)
    before = file.read_bytes()
    try:
        clean(check(file, training=training), tmp_path / "out.json")
    except DatasetError:  # nothing would be left
        return
    cleaned = check(tmp_path / "out.json", training=training)
    assert cleaned.findings.count("error") == 0, cleaned.findings.table()
    json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert file.read_bytes() == before


@pytest.mark.parametrize(("kind", "breaking"), CASES)
def test_each_break_is_cleaned(tmp_path: Path, kind: str, breaking: Break) -> None:
    file, out = broken(tmp_path, breaking), tmp_path / "out.json"
    if kind in ("no-image", "no-annotation", "not-coco"):
        with pytest.raises(DatasetError):
            clean(check(file), out)
        assert not out.exists()
        return
    done = clean(check(file), out)
    findings = check(out).findings
    assert findings.count("error") == 0, findings.table()
    assert not list(tmp_path.glob(".out*"))
    if KINDS[kind].severity == "error":
        assert done
    if not done and kind != "not-standard-json":
        assert json.loads(out.read_bytes()) == json.loads(file.read_bytes())


@pytest.mark.parametrize(
    ("breaking", "expected"),
    [
        (annotation(2, bbox=None), {"bbox": [5, 5, 15, 25]}),
        (annotation(bbox=[10, 10, 20, 0]), {"bbox": [10, 10, 20, 15]}),
        (annotation(2, area="375"), {"area": 375}),
        (annotation(num_keypoints=2), {"num_keypoints": 1}),
        (annotation(id=0), {"id": 1}),
        (annotation(id=None), {"id": 1}),
        (annotation(bbox=None, iscrowd=None), {"bbox": [10, 10, 20, 15]}),
        *(
            (annotation(segmentation=as_written), {"segmentation": [[10, 10, 30, 10, 30, 25]]})
            for as_written in (
                [10, 10, 30, 10, 30, 25],
                [[[10, 10], [30, 10], [30, 25]]],
                [[10, 10], [30, 10], [30, 25]],
            )
        ),
        (annotation(segmentation=None, area=None), {"area": 300}),
        (
            annotation(segmentation=[[1, 2], [10, 10, 30, 10, 30, 25, 10, 25]]),
            {"segmentation": [[10, 10, 30, 10, 30, 25, 10, 25]]},
        ),
    ],
)
def test_what_is_repaired(tmp_path: Path, breaking: Break, expected: dict[str, Any]) -> None:
    file, out = broken(tmp_path, breaking), tmp_path / "out.json"
    done = clean(check(file), out)
    changed = [
        (old, new)
        for old, new in zip(
            json.loads(file.read_text())["annotations"], json.loads(out.read_text())["annotations"]
        )
        if old != new
    ]
    assert len(changed) == 1
    assert {k: v for k, v in changed[0][1].items() if v != changed[0][0].get(k)} == expected
    assert all(what.startswith("repaired") for what in done)


def test_what_is_dropped(tmp_path: Path) -> None:
    file, out = broken(tmp_path, image(file_name="no.png")), tmp_path / "out.json"
    done = clean(check(file), out)
    assert done == {"dropped: image, image-missing": 1, "dropped: annotation, unknown-image": 1}
    content = json.loads(out.read_text())
    assert [i["id"] for i in content["images"]] == [2, 3]
    assert [a["id"] for a in content["annotations"]] == [12, 13, 14, 15]
    assert content["info"] == {"year": 2017}


@pytest.mark.parametrize(
    ("keypoints", "kind"),
    [
        ([12, 12, 2], "keypoint-count"),
        ("12", "keypoint-format"),
        ([12, NAN, 2, 0, 0, 0], "keypoint-format"),
    ],
)
def test_bad_keypoints_leave_box_and_mask(tmp_path: Path, keypoints: Any, kind: str) -> None:
    file = broken(tmp_path, annotation(keypoints=keypoints))
    assert clean(check(file), tmp_path / "out.json") == {f"dropped: keypoints, {kind}": 1}
    first, *others = json.loads((tmp_path / "out.json").read_text())["annotations"]
    expected = clean_document()["annotations"]
    del expected[0]["keypoints"], expected[0]["num_keypoints"]
    assert [first, *others] == expected


@pytest.mark.parametrize("names", [["valve", "grip"], ["valve"]])
def test_a_category_of_other_keypoints_stays_without_them(tmp_path: Path, names: list[str]) -> None:
    """As many or not: none of them may be taken for one of the first category's."""
    document = clean_document()
    document["categories"][1] |= {"keypoints": names, "skeleton": [[1, 1]]}
    document["annotations"][1] |= {"keypoints": [5, 5, 2] * len(names), "num_keypoints": 9}
    file = write(tmp_path, document)
    checked = check(file)
    assert {"category-keypoints", "keypoint-other"} <= checked.findings.keys()
    assert checked.classes == ["person", "ball"]
    done = clean(checked, tmp_path / "out.json")
    assert done["dropped: keypoints, category-keypoints"] == 1
    assert done["dropped: keypoints, keypoint-other"] == 1
    cleaned = json.loads((tmp_path / "out.json").read_text())
    assert cleaned == clean_document()
    assert check(tmp_path / "out.json").findings == {}


def test_an_image_of_another_size_goes_with_its_annotations(tmp_path: Path) -> None:
    """Whether its annotations are of the size in the file or of the one stated, nobody knows."""
    file, out = broken(tmp_path, picture(size=(2 * WIDTH, 2 * HEIGHT))), tmp_path / "out.json"
    done = clean(check(file), out)
    assert done == {"dropped: image, image-size": 1, "dropped: annotation, unknown-image": 1}
    content = json.loads(out.read_text())
    assert [i["id"] for i in content["images"]] == [2, 3]
    assert [a["id"] for a in content["annotations"]] == [12, 13, 14, 15]


@pytest.mark.parametrize(
    "breaking",
    [
        annotation(bbox=[5, 5, 30, 24]),  # of the whole object, the mask of what is seen
        annotation(1, bbox=[-5, 0, 50, 30]),
        annotation(2, area=900),
    ],
)
def test_boxes_and_areas_that_may_be_meant_are_left_alone(tmp_path: Path, breaking: Break) -> None:
    file, out = broken(tmp_path, breaking), tmp_path / "out.json"
    assert check(file).findings
    assert not clean(check(file), out)
    assert json.loads(out.read_bytes()) == json.loads(file.read_bytes())


def test_the_original_is_never_written(tmp_path: Path) -> None:
    file = broken(tmp_path, annotation(bbox=None))
    (tmp_path / "link.json").symlink_to(file)
    before = file.read_bytes()
    for out in (file, tmp_path / "images" / ".." / "a.json", tmp_path / "link.json"):
        with pytest.raises(DatasetError, match="the checked file itself"):
            clean(check(file), out)
    with pytest.raises(DatasetError, match="cannot be written"):
        clean(check(file), tmp_path / "no" / "out.json")
    assert file.read_bytes() == before


# Sets against each other


def pair(tmp_path: Path, breaking: Break) -> tuple[Checked, Checked]:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    train, test = write(tmp_path / "train", clean_document()), tmp_path / "test"
    broken(test, breaking)
    for index in (1, 2, 3):  # other pictures under the same names
        other = Image.new("RGB", (WIDTH, HEIGHT), (255, index, 0))
        other.save(test / "images" / f"{index}.png")
    return check(train), check(test / "a.json")


def test_sets_that_go_together(tmp_path: Path) -> None:
    train, test = pair(tmp_path, image())
    assert compare([train], test, num_classes=2, needs_keypoints=True) == {}


@pytest.mark.parametrize(
    ("breaking", "kind", "words"),
    [
        (category(1, name="bal"), "classes-differ", "is 'ball' the test set's 'bal'?"),
        (category(1, id=0), "classes-differ", "where 'person' is number 1"),
        (
            lambda d, _: d["categories"].append({"id": 9, "name": "dog"}),
            "classes-differ",
            "number 2 is None in the training set, 'dog' in the test set",
        ),
        (category(0, keypoints=["foot", "head"]), "keypoints-differ", "number 0 is 'head'"),
    ],
)
def test_names_that_differ(tmp_path: Path, breaking: Break, kind: str, words: str) -> None:
    findings = compare([(pair_ := pair(tmp_path, breaking))[0]], pair_[1])
    assert findings.keys() == {kind}
    assert words in findings[kind].example


def test_the_model_is_compared(tmp_path: Path) -> None:
    train, test = pair(tmp_path, image())
    assert compare([train], test, num_classes=3).keys() == {"num-classes"}
    for checked in (train, test):
        checked.keypoints = []
    assert compare([train], test, needs_keypoints=True).keys() == {"no-keypoints"}


def test_more_objects_than_detections_are_a_warning(tmp_path: Path) -> None:
    train, test = pair(tmp_path, image())
    most = max(test.objects.values())
    assert compare([train], test, limits={"a.key": most}) == {}
    found = compare([train], test, limits={"a.key": most - 1, "b.key": 100})["detections-limited"]
    assert found.severity == "warning"
    for words in ("of 3 test images", f"up to {most}", f"{most - 1}", "a.key"):
        assert words in found.example


def test_a_test_set_without_annotations_is_not_compared(tmp_path: Path) -> None:
    """COCO's test-dev lists all 80 categories, without keypoints, also for the person's task."""
    document = clean_document()
    document["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    del document["annotations"]
    (tmp_path / "train").mkdir()
    train = check(write(tmp_path / "train", clean_document()))
    test = check(write(tmp_path, document), training=False)
    options = {"needs_keypoints": True, "open_images": False}
    assert compare([train], test, num_classes=2, **options) == {}
    assert compare([train], test, num_classes=80, **options).keys() == {"num-classes"}


def test_an_image_in_both_sets_is_a_leak(tmp_path: Path) -> None:
    train, test = pair(tmp_path, image())
    folder = tmp_path / "test" / "images"
    (folder / "2.png").write_bytes((tmp_path / "train" / "images" / "2.png").read_bytes())
    findings = compare([train], test)
    assert findings["leak"].first == [str(folder / "2.png")[:60]]
    assert compare([train], test, open_images=False) == {}
    assert compare([train], train, open_images=False)["leak"].count == 3


def test_a_leak_is_found_among_files_of_one_name(tmp_path: Path) -> None:
    """A folder for each video, whose frames are named alike."""
    train, test = pair(tmp_path, image())
    leaked = Path(next(iter(test.paths.values())))
    for number in range(4):
        file = tmp_path / str(number) / leaked.name
        file.parent.mkdir()
        file.write_bytes(leaked.read_bytes() if number == 2 else bytes(number))
        train.paths[f"video {number}"] = str(file)
    assert compare([train], test)["leak"].first == [str(leaked)[:60]]


@pytest.mark.parametrize("name", ["\0.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_is_not_compared(tmp_path: Path, name: str) -> None:
    train, test = pair(tmp_path, image(file_name=name))
    assert test.findings.keys() == {"image-missing"}
    assert compare([train], test) == compare([test], train) == {}


def test_a_set_that_was_not_read_is_not_compared(tmp_path: Path) -> None:
    train, _ = pair(tmp_path, image())
    assert compare([train], check(tmp_path / "no.json")) == {}


def test_what_an_evaluation_refuses_is_an_error_of_a_test_set(tmp_path: Path) -> None:
    document = clean_document()
    document["annotations"][0]["segmentation"] += [[]]
    del document["annotations"][1]["area"]
    file = write(tmp_path, document)
    for training, severity in ((True, "warning"), (False, "error")):
        findings = check(file, training=training).findings
        assert findings["polygon-dropped"].severity == severity
        assert findings["area-missing"].severity == severity


def test_true_for_1_is_put_right(tmp_path: Path) -> None:
    document = clean_document()
    document["annotations"][1] |= {**rectangle(1, 1, 6, 6), "bbox": [1, True, 5, 5]}
    file = write(tmp_path, document)
    clean(check(file), tmp_path / "out.json")
    assert not check(tmp_path / "out.json").findings.count("error")


def test_names_without_a_folder_are_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("1.png").touch()
    assert missing(["1.png", "2.png"]) == {"2.png"}
