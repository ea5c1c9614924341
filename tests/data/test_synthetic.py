"""The synthetic dataset: files, annotations against pixels, keypoints on scenes made by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mask_rcnn_plugin.data import synthetic
from mask_rcnn_plugin.data.figures import (
    KEYPOINTS,
    SHAPES,
    Array,
    Figure,
    Outfit,
    draw_person,
    draw_shape,
    sample_pose,
)
from mask_rcnn_plugin.data.synthetic import (
    CATEGORIES,
    SKELETON,
    annotate,
    draw_sample,
    mask_to_polygons,
    write_dataset,
)

ROOT = Path(__file__).parents[2]
ARGUMENTS: dict[str, Any] = {"train": 60, "val": 10, "size": 96, "seed": 7}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "set"
    write_dataset(root, **ARGUMENTS)
    return root


@pytest.fixture(scope="module")
def coco(dataset: Path) -> COCO:
    return COCO(str(dataset / "train.json"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def decode(segmentation: Any, size: int) -> Array:
    if isinstance(segmentation, list):
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, size, size)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, size, size)
    return mask_util.decode(segmentation)


def standing_person(
    size: int = 200, shift: tuple[float, float] = (100, 110), **options: Any
) -> Figure:
    """A person 160 px tall with the arms held out a little; `shift` is the middle of the hips."""
    half = {  # x of the left side, y; the right side mirrors it
        **{"eye": (5, -73), "ear": (12, -70), "shoulder": (19, -50), "elbow": (38, -30)},
        **{"wrist": (50, -10), "hip": (11, 0), "knee": (14, 38), "ankle": (16, 74)},
    }
    points = [(0.0, -68.0)]
    for name in KEYPOINTS[1:]:
        side, joint = name.split("_")
        x, y = half[joint]
        points.append((x if side == "left" else -x, y))
    colour = np.array([200.0, 40, 60])
    skin = np.array([150.0, 180, 220])
    outfit = Outfit(skin, colour / 3, colour, skin, colour / 2, skin, colour / 4)
    at = np.array(points) + shift
    return draw_person(at, 160, outfit, np.ones((size, size)), **options)


def square(size: int, x0: float, y0: float, x1: float) -> Figure:
    """An upright square whose pixels are x0 to x1 of each row from y0."""
    half = (x1 - x0) / 2
    centre, fill = np.array([x0 + half, y0 + half]), np.full((size, size, 3), 90, np.uint8)
    return draw_shape("square", centre, half * 2**0.5, np.pi / 4, fill)


def visibility(annotation: dict[str, Any]) -> dict[str, int]:
    return dict(zip(KEYPOINTS, annotation["keypoints"][2::3]))


# --- files ------------------------------------------------------------------------------------


def test_same_arguments_give_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", **ARGUMENTS)
    first, second = contents(dataset), contents(tmp_path / "again")
    assert set(first) == {
        *("synthetic.json", "train.json", "val.json"),
        *("person_keypoints_train.json", "person_keypoints_val.json"),
        *(f"train/{i:06d}.jpg" for i in range(60)),
        *(f"val/{i:06d}.jpg" for i in range(10)),
    }
    assert first == second


def test_people_alone_in_a_file_of_their_own(dataset: Path) -> None:
    whole = json.loads((dataset / "train.json").read_text())
    people = json.loads((dataset / "person_keypoints_train.json").read_text())
    assert [c["name"] for c in people["categories"]] == ["person"]
    assert people["images"] == whole["images"]
    kept = [a for a in whole["annotations"] if a["category_id"] == 1]
    assert 0 < len(kept) < len(whole["annotations"])
    assert people["annotations"] == kept


def test_images_depend_on_seed_split_and_index_but_not_on_their_number(
    dataset: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "fewer", **{**ARGUMENTS, "train": 4})
    write_dataset(tmp_path / "other", **{**ARGUMENTS, "train": 4, "seed": 8})
    few, other, full = (contents(p) for p in (tmp_path / "fewer", tmp_path / "other", dataset))
    for index in range(4):
        name = f"{index:06d}.jpg"
        assert few[f"train/{name}"] == full[f"train/{name}"] != other[f"train/{name}"]
        assert full[f"train/{name}"] != full[f"val/{name}"]
    assert len({full[f"train/{i:06d}.jpg"] for i in range(60)}) == 60


def test_a_finished_data_set_is_left_alone(dataset: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    write_dataset(dataset, **ARGUMENTS)
    assert times == {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}


@pytest.mark.parametrize("change", [{"train": 61}, {"val": 9}, {"size": 97}, {"seed": 6}])
def test_other_arguments_do_not_overwrite(dataset: Path, change: dict[str, int]) -> None:
    before = contents(dataset)
    with pytest.raises(ValueError, match=r"drawn with .*choose another folder"):
        write_dataset(dataset, **{**ARGUMENTS, **change})
    assert contents(dataset) == before


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("precious")
    with pytest.raises(ValueError, match="not a synthetic dataset"):
        write_dataset(tmp_path, **ARGUMENTS)
    assert contents(tmp_path) == {"train.json": b"precious"}


def test_an_interrupted_data_set_is_finished_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {**ARGUMENTS, "train": 3, "val": 2}
    drawn = 0

    def interrupted(*args: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 5:  # the last image
            raise KeyboardInterrupt
        return draw_sample(*args)

    monkeypatch.setattr(synthetic, "draw_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "cut", **small)
    monkeypatch.undo()
    assert not any((tmp_path / "cut" / f"{split}.json").exists() for split in ("train", "val"))
    write_dataset(tmp_path / "cut", **small)
    write_dataset(tmp_path / "whole", **small)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "value"),
    [("train", -1), ("val", -1), ("size", 63), ("seed", -1), ("train", 2.0), ("size", "96")],
)
def test_arguments_out_of_range(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least .*{value!r}"):
        write_dataset(tmp_path / "set", **{**ARGUMENTS, name: value})
    assert not (tmp_path / "set").exists()


def test_empty_splits(tmp_path: Path) -> None:
    write_dataset(tmp_path, train=0, val=0, size=64, seed=0)
    assert COCO(str(tmp_path / "val.json")).getImgIds() == []


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run_python: Callable[..., Any]
) -> None:
    sizes = ["--train", "2", "--val", "1", "--size", "64"]
    arguments = ["--out", str(tmp_path), *sizes, "--seed"]
    done = run_python("-m", "mask_rcnn_plugin.data.synthetic", *arguments, "3", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train.json: 2 images" in done.stdout
    assert len(list(tmp_path.glob("*/*.jpg"))) == 3
    with pytest.raises(SystemExit):
        synthetic.main([*arguments, "4"])
    assert "drawn with" in capsys.readouterr().err


# --- the documents ----------------------------------------------------------------------------


def test_document(dataset: Path, coco: COCO) -> None:
    assert coco.dataset["info"]["seed"] == 7
    assert tuple(category["name"] for category in coco.loadCats(coco.getCatIds())) == CATEGORIES
    person, *others = coco.loadCats(coco.getCatIds())
    assert person["keypoints"] == list(KEYPOINTS)
    assert person["skeleton"] == [list(pair) for pair in SKELETON]
    assert not any("keypoints" in category for category in others)
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = cv2.imread(str(dataset / "train" / image["file_name"]))
        assert pixels is not None
        assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)
    ids = coco.getAnnIds()
    assert min(ids) == 1
    assert len(set(ids)) == len(coco.dataset["annotations"])
    assert {a["category_id"] for a in coco.loadAnns(ids)} == {1, 2, 3, 4, 5}


def _mirror(name: str) -> str:
    side, _, joint = name.partition("_")
    return {"left": f"right_{joint}", "right": f"left_{joint}"}.get(side, name)


def test_skeleton_joins_neighbours() -> None:
    bones = {frozenset(KEYPOINTS[i - 1] for i in pair) for pair in SKELETON}
    mirrored = {frozenset(_mirror(name) for name in bone) for bone in bones}
    assert len(bones) == 19
    assert mirrored == bones
    for side in ("left", "right"):
        for bone in (("shoulder", "elbow"), ("elbow", "wrist"), ("hip", "knee"), ("knee", "ankle")):
            assert frozenset(f"{side}_{joint}" for joint in bone) in bones


def test_masks_boxes_and_areas_agree(coco: COCO) -> None:
    annotations = coco.loadAnns(coco.getAnnIds())
    assert any(a["iscrowd"] for a in annotations)
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert annotation["area"] == mask.sum() > 0
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


def test_visible_masks_never_overlap(coco: COCO) -> None:
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(image_id))]
        assert np.sum([np.zeros((96, 96)), *masks], axis=0).max() <= 1


def test_segmentation_formats(coco: COCO) -> None:
    for annotation in coco.loadAnns(coco.getAnnIds()):
        segmentation = annotation["segmentation"]
        if annotation["iscrowd"]:
            assert set(segmentation) == {"size", "counts"}
            assert sum(segmentation["counts"]) == 96 * 96
        elif CATEGORIES[annotation["category_id"] - 1] == "ring" or isinstance(segmentation, dict):
            assert isinstance(segmentation["counts"], str)
        else:
            assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)


def test_keypoints_lie_in_the_image(coco: COCO) -> None:
    seen = set()
    for annotation in coco.loadAnns(coco.getAnnIds()):
        if annotation["category_id"] != 1:
            assert "keypoints" not in annotation
            continue
        triples = np.reshape(annotation["keypoints"], (17, 3))
        assert annotation["num_keypoints"] == (triples[:, 2] > 0).sum()
        assert (triples[triples[:, 2] == 0] == 0).all()
        assert ((triples[:, :2] >= 0) & (triples[:, :2] <= 95)).all()
        mask = coco.annToMask(annotation)
        visible = np.rint(triples[triples[:, 2] == 2]).astype(int)
        assert mask[visible[:, 1], visible[:, 0]].all()
        seen |= set(triples[:, 2])
    assert seen == {0, 1, 2}


# --- samples ----------------------------------------------------------------------------------


def test_samples_are_as_promised() -> None:
    counts, crowds = [], []
    for seed in range(150):
        image, annotations = draw_sample(np.random.default_rng(seed), 64)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        counts.append(len(annotations))
        crowds += [annotation for annotation in annotations if annotation["iscrowd"]]
        assert all(annotation["area"] >= 16 for annotation in annotations)
    assert 1 <= counts.count(0) <= 12
    assert 3 <= len(crowds) <= 20
    assert max(counts) <= 6
    assert np.mean(counts) > 2


def test_a_crowd_of_people_has_no_keypoints() -> None:
    rng = np.random.default_rng(0)
    image = np.full((128, 128, 3), 128, np.uint8)
    crowd = next(
        c for c in (synthetic._crowd(rng, image) for _ in range(50)) if c.category == "person"
    )
    (annotation,) = annotate([crowd])
    assert annotation["iscrowd"] == 1
    assert annotation["keypoints"] == [0] * 51
    assert annotation["num_keypoints"] == 0
    np.testing.assert_array_equal(decode(annotation["segmentation"], 128), crowd.mask)


@pytest.mark.parametrize("category", SHAPES)
def test_shapes(category: str) -> None:
    fill = np.full((100, 100, 3), 200, np.uint8)
    figure = draw_shape(category, np.array([50.0, 45.0]), 30, 0.3, fill, 0.5)
    (annotation,) = annotate([figure])
    mask = decode(annotation["segmentation"], 100)
    np.testing.assert_array_equal(mask, figure.mask)
    full = 30**2 * {"circle": np.pi, "square": 2, "star": 10 * 0.45 * np.sin(np.pi / 5) / 2}.get(
        category, np.pi * 0.75
    )
    assert annotation["area"] == pytest.approx(full, rel=0.12)  # smooth edges add half a pixel
    assert mask[45, 50] == (category != "ring")
    assert figure.over(np.zeros((100, 100, 3), np.uint8))[mask == 1].min() >= 90
    assert isinstance(annotation["segmentation"], dict) == (category == "ring")


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"category must be one of .*'heart'"):
        draw_shape("heart", np.zeros(2), 5, 0, np.zeros((64, 64, 3), np.uint8))


def test_an_object_split_by_another_has_two_polygons() -> None:
    bar, back = square(100, 45, 0, 55), square(100, 20, 2, 80)
    cover = Figure("square", np.repeat(bar.paint[5:6], 100, 0), np.repeat(bar.alpha[5:6], 100, 0))
    behind, front = annotate([back, cover])
    assert len(behind["segmentation"]) == 2
    assert len(front["segmentation"]) == 1
    np.testing.assert_array_equal(decode(behind["segmentation"], 100), back.mask & ~cover.mask)


def test_an_object_holed_by_another_has_an_rle_and_a_hidden_one_nothing() -> None:
    back, front, hidden = square(100, 20, 20, 80), square(100, 40, 40, 60), square(100, 45, 45, 50)
    behind, before = annotate([hidden, back, front])
    assert isinstance(behind["segmentation"]["counts"], str)
    assert (behind["area"], before["area"]) == (
        back.mask.sum() - front.mask.sum(),
        front.mask.sum(),
    )


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_polygons_cover_exactly_the_mask(mask: Array) -> None:
    polygons = mask_to_polygons(mask)
    outside, _ = cv2.connectedComponents(
        np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=4
    )
    assert (polygons is None) == (outside > 2)
    if polygons:
        parts = mask_util.frPyObjects(polygons, *mask.shape)
        np.testing.assert_array_equal(mask_util.decode(mask_util.merge(parts)), mask)


def test_polygon_of_known_pixels_is_in_continuous_coordinates() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:5, 3:8] = True  # rows 2 to 4, columns 3 to 7
    (polygon,) = mask_to_polygons(mask) or []
    corners = set(zip(polygon[::2], polygon[1::2]))
    assert corners == {(3.0, 2.0), (8.0, 2.0), (8.0, 5.0), (3.0, 5.0)}


# --- people -----------------------------------------------------------------------------------


def test_a_person_in_the_open_shows_every_keypoint() -> None:
    (annotation,) = annotate([standing_person()])
    assert set(annotation["keypoints"][2::3]) == {2}
    assert annotation["num_keypoints"] == 17
    # In COCO's frame, which is the drawing's: pixel indices.
    assert annotation["keypoints"][:3] == [100, 42, 2]


def test_what_another_object_covers_is_labelled_as_hidden() -> None:
    person, cover = standing_person(), square(200, 50, 100, 150)
    annotation, _ = annotate([person, cover])
    hidden = {name for name, v in visibility(annotation).items() if v == 1}
    below = ("wrist", "hip", "knee", "ankle")
    assert hidden == {f"{side}_{joint}" for side in ("left", "right") for joint in below}
    assert 0 not in visibility(annotation).values()
    # Behind the person, the same square hides nothing.
    _, annotation = annotate([cover, person])
    assert set(visibility(annotation).values()) == {2}


def test_what_is_outside_the_image_is_not_labelled() -> None:
    (annotation,) = annotate([standing_person(shift=(100, 180))])
    outside = {name for name, v in visibility(annotation).items() if v == 0}
    assert outside == {"left_knee", "right_knee", "left_ankle", "right_ankle"}
    assert annotation["num_keypoints"] == 13
    triples = np.reshape(annotation["keypoints"], (17, 3))
    assert (triples[triples[:, 2] == 0] == 0).all()


def test_the_own_body_hides_keypoints() -> None:
    open_pose = standing_person()
    assert open_pose.keypoints is not None
    keypoints = open_pose.keypoints.copy()
    keypoints[KEYPOINTS.index("left_wrist")] = [105, 85]  # before or behind the chest
    outfit = Outfit(*np.full((7, 3), 99.0))
    shade = np.ones((200, 200))
    (before,) = annotate([draw_person(keypoints, 160, outfit, shade)])
    (behind,) = annotate([draw_person(keypoints, 160, outfit, shade, arms_behind=["left"])])
    assert visibility(before)["left_wrist"] == 2
    assert visibility(behind)["left_wrist"] == 1
    both = standing_person(arms_behind=["left", "right"])  # beside the body, where nothing hides
    assert (both.mask == open_pose.mask).mean() > 0.999
    keypoints[KEYPOINTS.index("left_wrist")] = [110, 40]  # a hand before the face
    (face,) = annotate([draw_person(keypoints, 160, outfit, shade)])
    assert visibility(face)["left_eye"] == 1


def test_people_face_the_viewer_upright() -> None:
    for seed in range(100):
        pose = dict(zip(KEYPOINTS, sample_pose(np.random.default_rng(seed))))
        for joint in ("eye", "ear", "shoulder", "hip"):
            assert pose[f"left_{joint}"][0] > pose[f"right_{joint}"][0]
        for side in ("left", "right"):
            assert pose["nose"][1] < pose[f"{side}_shoulder"][1] < pose[f"{side}_hip"][1]
            assert pose[f"{side}_hip"][1] < pose[f"{side}_ankle"][1]
