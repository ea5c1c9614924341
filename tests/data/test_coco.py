"""COCO's splits and registration of a user's own dataset."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json

from mask_rcnn_plugin.data import annotation_file, coco
from mask_rcnn_plugin.data.check import check_file
from mask_rcnn_plugin.data.coco import (
    DatasetError,
    left_right_pairs,
    register_coco_dataset,
)

IMAGE = {"id": 1, "file_name": "a.png", "width": 8, "height": 8}


def write(folder: Path, categories: list[dict[str, Any]], **content: Any) -> str:
    file = folder / "annotations.json"
    content = {"images": [], "annotations": [], "categories": categories, **content}
    file.write_text(json.dumps(content))
    return str(file)


@pytest.mark.parametrize(
    "split",
    [
        *(coco.TRAINVAL35K + coco.MINIVAL + coco.TEST_DEV),
        *(coco.KEYPOINT_TRAINVAL35K + coco.KEYPOINT_MINIVAL + coco.KEYPOINT_TEST_DEV),
    ],
)
def test_splits_are_registered_with_detectron2(split: str) -> None:
    assert split in DatasetCatalog.list()
    metadata = MetadataCatalog.get(split)
    assert len(metadata.thing_classes) == (1 if split.startswith("keypoints") else 80)
    assert len(metadata.get("keypoint_names") or []) == (17 if "keypoints" in split else 0)


def test_detectron2_datasets_is_honoured(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    script = (
        "import mask_rcnn_plugin\n"
        "from detectron2.data import MetadataCatalog\n"
        "from mask_rcnn_plugin.data import coco\n"
        "for name in coco.MINIVAL + coco.KEYPOINT_TEST_DEV:\n"
        "    print(MetadataCatalog.get(name).json_file)\n"
    )
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    done = run_python("-c", script, env=env)
    annotations = tmp_path / "coco" / "annotations"
    assert done.stdout.split() == [
        str(annotations / "instances_minival2014.json"),
        str(annotations / "image_info_test-dev2017.json"),
    ]


def test_keypoint_test_dev_loads_persons_only(tmp_path: Path) -> None:
    (name,) = coco.KEYPOINT_TEST_DEV
    metadata = MetadataCatalog.get(name)
    assert list(metadata.thing_classes) == ["person"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0}


def test_classes_are_the_categories_by_id(tmp_path: Path) -> None:
    file = write(tmp_path, [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}])
    name = register_coco_dataset(file, str(tmp_path))
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get(name).get("keypoint_names") is None
    assert DatasetCatalog.get(name) == []


def test_registering_again_reads_the_categories_anew(tmp_path: Path) -> None:
    file = write(tmp_path, [{"id": 1, "name": "cat"}])
    register_coco_dataset(file, str(tmp_path))
    write(tmp_path, [{"id": 1, "name": "dog"}])
    name = register_coco_dataset(file, str(tmp_path))
    assert MetadataCatalog.get(name).thing_classes == ["dog"]


def test_keypoints_flips_and_skeleton_come_from_the_categories(tmp_path: Path) -> None:
    bird = {
        "id": 1,
        "name": "bird",
        "keypoints": ["beak", "left_wing", "right_wing", "l_foot", "r_foot"],
        "skeleton": [[1, 2], [1, 3]],
        "keypoint_sigmas": [0.1, 0.2, 0.2, 0.3, 0.3],
    }
    name = register_coco_dataset(write(tmp_path, [bird, {"id": 2, "name": "nest"}]), str(tmp_path))
    metadata = MetadataCatalog.get(name)
    assert metadata.keypoint_names == bird["keypoints"]
    assert metadata.keypoint_classes == ["bird"]
    assert metadata.keypoint_flip_map == [("left_wing", "right_wing"), ("l_foot", "r_foot")]
    pairs = [(a, b) for a, b, _ in metadata.keypoint_connection_rules]
    assert pairs == [("beak", "left_wing"), ("beak", "right_wing")]
    assert metadata.keypoint_oks_sigmas == [0.1, 0.2, 0.2, 0.3, 0.3]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        *(("left_eye", "right_eye"), ("l_eye", "r_eye"), ("L_Eye", "R_Eye")),
        *(("Left Eye", "Right Eye"), ("leftEye", "rightEye"), ("eye.l", "eye.r")),
        *(("EyeL", "EyeR"), ("LEye", "REye"), ("lefteye", "righteye"), ("eye-left", "eye-right")),
        *(("L_F_Paw", "R_F_Paw"), ("LEFT_EYE", "RIGHT_EYE"), ("paw 1 l", "paw 1 r")),
        ("left_arm_l", "right_arm_l"),
    ],
)
def test_left_and_right_are_found_in_any_usual_spelling(left: str, right: str) -> None:
    assert left_right_pairs(["Nose", right, left, "tail"]) == ([(left, right)], [])


@pytest.mark.parametrize(
    "names",
    [["nose", "bright_spot"], ["l_to_r"], ["left_or_right_hand"], ["wheel", "roller", "tail"], []],
)
def test_names_without_a_side_are_no_pairs(names: list[str]) -> None:
    assert left_right_pairs(names) == ([], [])


def test_a_side_without_a_partner_is_told() -> None:
    names = ["left_eye", "right_ear", "left_paw", "right_paw", "eye_right"]
    assert left_right_pairs(names) == (
        [("left_paw", "right_paw")],
        ["left_eye", "right_ear", "eye_right"],
    )


@pytest.mark.parametrize(
    ("skeleton", "expected"),
    [
        ([[1, 2], [2, 3]], [("a", "b"), ("b", "c")]),
        ([[0, 1], [1, 2]], [("a", "b"), ("b", "c")]),  # counted from 0
        *((nothing, []) for nothing in (None, [], 3, {"a": 1}, [[1]], [1, 2], [["a", "b"]])),
        *((nothing, []) for nothing in ([[1, 4]], [[0, 3]], [[True, 2]], [[-1, 1]], [[1.0, 2]])),
    ],
)
def test_a_skeleton_is_drawn_or_left_out(
    skeleton: object, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    worm = {"id": 1, "name": "worm", "keypoints": ["a", "b", "c"], "skeleton": skeleton}
    name = register_coco_dataset(write(tmp_path, [worm]), str(tmp_path))
    rules = MetadataCatalog.get(name).keypoint_connection_rules
    assert [(a, b) for a, b, _ in rules] == expected


def test_a_flip_map_in_the_file_is_taken(tmp_path: Path) -> None:
    fish = {"id": 1, "name": "fish", "keypoints": ["p", "q"], "keypoint_flip_map": [["p", "q"]]}
    name = register_coco_dataset(write(tmp_path, [fish]), str(tmp_path))
    assert MetadataCatalog.get(name).keypoint_flip_map == [("p", "q")]
    assert MetadataCatalog.get(name).get("keypoint_oks_sigmas") is None


def test_coco_keypoints_have_flip_pairs(toy_dataset: Path) -> None:
    name = register_coco_dataset(str(toy_dataset / "val.json"), str(toy_dataset / "val"))
    metadata = MetadataCatalog.get(name)
    assert metadata.keypoint_names[0] == "nose"
    assert len(metadata.keypoint_flip_map) == 8


@pytest.mark.parametrize(
    ("categories", "content", "message"),
    [
        ([], {}, "'categories' must be"),
        ([{"name": "no id"}], {}, "id is None, must be an integer"),
        ([{"id": 1, "name": "a"}, {"id": "2", "name": "b"}], {}, "id is '2', must be an integer"),
        ([{"id": 1, "name": "a", "keypoints": {"x": 1}}], {}, "must be a list of names"),
        ([{"id": 1, "name": "a", "keypoint_sigmas": "0.1"}], {}, "keypoint_sigmas are '0.1'"),
        ([{"id": 1, "name": "a", "keypoint_flip_map": 3}], {}, "keypoint_flip_map is 3"),
        (5, {}, "'categories' must be"),
        ([{"id": 1, "name": "a"}], {"images": None}, "'images' must be a list"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], {}, "categories have the same id"),
        ([{"id": 1, "name": "a", "keypoints": ["x", "x"]}], {}, "must be different names"),
        ([{"id": 10**400, "name": "a"}], {}, "id is 1000.* must be an integer"),
        ([{"id": 1, "name": "a"}], {"images": [IMAGE, IMAGE]}, "images have the same id"),
        ([{"id": 1, "name": "a"}], {"images": [IMAGE | {"width": "8"}]}, "width is '8', must be"),
        ([{"id": 1, "name": "a"}], {"images": [IMAGE | {"height": 0}]}, "height is 0, must be"),
        ([{"id": 1, "name": "a"}], {"images": [IMAGE | {"file_name": 5}]}, "file_name is 5"),
        ([{"id": 1, "name": "a"}], {"images": [7]}, "image is 7, must be an object"),
        (
            [
                {"id": 1, "name": "a", "keypoints": ["x"]},
                {"id": 2, "name": "b", "keypoints": ["y"]},
            ],
            {},
            "'a' and 'b' have different keypoints",
        ),
        (
            [{"id": 1, "name": "a", "keypoints": ["x"], "keypoint_sigmas": [0.1, 0.2]}],
            {},
            "must be 1 numbers above 0 and at most 1",
        ),
    ],
)
def test_what_is_not_coco_format_is_refused(
    tmp_path: Path, categories: Any, content: dict[str, Any], message: str
) -> None:
    file = write(tmp_path, categories, **content)
    with pytest.raises(DatasetError, match=message):
        register_coco_dataset(file, str(tmp_path))


def test_missing_file_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, [{"id": 1, "name": "a"}])
    with pytest.raises(DatasetError, match=r"train\.json' does not exist; .*annotations\.json"):
        register_coco_dataset(str(tmp_path / "train.json"), str(tmp_path))


def test_missing_image_folder_and_broken_json_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, [{"id": 1, "name": "a"}])
    with pytest.raises(DatasetError, match="image folder '.*nowhere'"):
        register_coco_dataset(file, str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match="no image folder given"):
        register_coco_dataset(file, "")
    latin_1 = json.dumps({"images": [], "categories": [{"id": 1, "name": "x"}]}).encode()
    for content in (b"{", latin_1.replace(b'"x"', b'"\xe4"')):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(DatasetError, match="is not JSON"):
            register_coco_dataset(str(tmp_path / "broken.json"), str(tmp_path))


def test_an_annotation_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:  # by its permissions root reads any file
        raise PermissionError(13, "Permission denied", str(path))

    file = write(tmp_path, [{"id": 1, "name": "a"}])
    for method in ("read_bytes", "is_file"):  # is_file: where its folder may not be searched
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(DatasetError, match=r"json' cannot be read: .*Permission denied"):
                register_coco_dataset(file, str(tmp_path))


SOUND = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}


@pytest.mark.parametrize(
    ("annotations", "cause"),
    [
        ([SOUND, SOUND], "AssertionError: Annotation ids .* not unique"),
        ([SOUND | {"category_id": 9}], "category_id=9"),
        ([{k: v for k, v in SOUND.items() if k != "image_id"}], "KeyError: 'image_id'"),
        ([SOUND | {"segmentation": {"size": [8, 8], "counts": [-1]}}], "OverflowError"),
        ([SOUND | {"segmentation": {"size": 8, "counts": [64]}}], "TypeError"),
        ([SOUND | {"segmentation": 5}], "TypeError"),
        ([5], "TypeError"),
        (5, "TypeError"),
    ],
)
def test_broken_annotations_are_one_error_with_advice(
    tmp_path: Path, annotations: Any, cause: str
) -> None:
    file = write(tmp_path, [{"id": 1, "name": "a"}], images=[IMAGE], annotations=annotations)
    name = register_coco_dataset(file, str(tmp_path))
    with pytest.raises(DatasetError, match=cause) as info:
        DatasetCatalog.get(name)
    assert str(info.value).startswith(f"annotation file {file!r} cannot be loaded")
    assert f"check_dataset.py --json {file} --images {tmp_path} --fix OUT.json" in str(info.value)


def test_numbers_that_equal_integers_are_loaded_as_such(tmp_path: Path) -> None:
    image = {**IMAGE, "id": 1.0, "width": 8.0, "height": 8.0}
    found = {**SOUND, "image_id": 1.0, "category_id": 3.0, "iscrowd": None}
    file = write(tmp_path, [{"id": 3.0, "name": "a"}], images=[image], annotations=[found])
    name = register_coco_dataset(file, str(tmp_path))
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {3: 0}
    (record,) = get_detection_dataset_dicts(name)  # without iscrowd's 0 a crowd, and left out
    numbers = [record[key] for key in ("image_id", "width", "height")]
    assert (numbers, set(map(type, numbers))) == ([1, 8, 8], {int})
    assert record["annotations"][0]["category_id"] == record["annotations"][0]["iscrowd"] == 0


def test_annotations_keep_their_ids(toy_dataset: Path) -> None:
    name = register_coco_dataset(str(toy_dataset / "val.json"), str(toy_dataset / "val"))
    ids = [a["id"] for image in DatasetCatalog.get(name) for a in image["annotations"]]
    content = json.loads((toy_dataset / "val.json").read_text())
    assert sorted(ids) == sorted(a["id"] for a in content["annotations"])


POLYGON = [0, 0, 4, 0, 4, 4.5]
PLAIN = {
    "bare": {},
    "without iscrowd": {"iscrowd": None},
    "polygons": {"segmentation": [POLYGON, [1.25, 2, 3, 4, 5, 6]]},
    "a polygon too short": {"segmentation": [[1, 2, 3, 4], POLYGON, [1] * 7]},
    "no polygon": {"segmentation": []},
    "run lengths": {"segmentation": {"size": [8, 8], "counts": [3, 61]}, "iscrowd": 1},
    "compressed": {"segmentation": {"size": [8, 8], "counts": "3m1", "more": 0}, "iscrowd": 1},
    "keypoints": {"keypoints": [1, 2, 2, 3.5, 4, 0], "num_keypoints": 1},
    "no keypoints": {"keypoints": []},
    "other keys": {"ignore": 0, "score": 0.5, "attributes": {"occluded": True}},
    "a box of floats": {"bbox": [0.5, 1, 2, 3]},
}


@pytest.mark.parametrize("changes", PLAIN.values(), ids=PLAIN)
def test_plain_annotations_are_loaded_as_detectron2_does(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**SOUND, "id": 5, "image_id": 2, "category_id": 3}
    changed = {k: v for k, v in {**other, "id": 4, **changes}.items() if v is not None}
    file = write(
        tmp_path,
        [{"id": 3, "name": "b"}, {"id": 1, "name": "a"}],
        images=[{**IMAGE, "id": 2, "file_name": "b.png", "license": 1}, IMAGE],
        annotations=[other, changed, SOUND],
    )
    name = register_coco_dataset(file, str(tmp_path))
    expected = load_coco_json(file, str(tmp_path), name, extra_annotation_keys=["id"])
    monkeypatch.delattr(coco, "load_coco_json")
    assert DatasetCatalog.get(name) == expected
    assert len(expected[1]["annotations"]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"image_id": 7},
            {"image_id": 1.0},
            {"segmentation": [[1, 2]]},
            {"iscrowd": None},
            {"area": math.nan},
        ),
        *({"segmentation": None}, {"keypoints": None}, {"ignore": False}, {"area": 10**400}),
    ],
)
def test_other_annotations_are_left_to_detectron2(changes: dict[str, Any], tmp_path: Path) -> None:
    annotations = [{**SOUND, "id": 2}, {**SOUND, **changes}]
    file = write(tmp_path, [{"id": 1, "name": "a"}], images=[IMAGE], annotations=annotations)
    name = register_coco_dataset(file, str(tmp_path))
    assert coco._records(file, str(tmp_path)) is None
    (record,) = DatasetCatalog.get(name)
    assert record["annotations"][0]["id"] == 2


def test_a_kept_file_is_decoded_once_until_it_changes(
    toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, decoded = annotation_file.decode_document, list[str]()
    monkeypatch.setattr(
        annotation_file, "decode_document", lambda f: decoded.append(f) or decode(f)
    )
    monkeypatch.setattr(coco, "decode_document", annotation_file.decode_document)
    file, images = str(tmp_path / "train.json"), str(toy_dataset / "train")
    other, other_images = str(toy_dataset / "val.json"), str(toy_dataset / "val")
    shutil.copy(toy_dataset / "train.json", file)
    register_coco_dataset(file, images)
    expected = DatasetCatalog.get(file), check_file(file, images).findings
    assert decoded == [file]
    annotation_file.keep_decoded(True)
    try:
        register_coco_dataset(file, images)
        register_coco_dataset(other, other_images)
        assert check_file(other, other_images).document is not None
        assert (DatasetCatalog.get(file), check_file(file, images).findings) == expected
        assert DatasetCatalog.get(file) == expected[0]
        assert decoded == [file] * 2
        content = json.loads(Path(file).read_text())
        content["annotations"] = content["annotations"][1:]
        Path(file).write_text(json.dumps(content))
        assert sum(len(r["annotations"]) for r in DatasetCatalog.get(file)) == len(
            content["annotations"]
        )
    finally:
        annotation_file.keep_decoded(False)
    assert annotation_file.kept_document(file) is None
