"""The rule of which annotations can be trained on."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_util

from mask_rcnn_plugin.data.annotation_rules import annotation_faults, rle_counts

WIDTH, HEIGHT = 8, 6
NAN, INF = float("nan"), float("inf")
# 3 columns of 6 pixels off, the middle two pixels of the next column on, the rest off.
RLE = {"size": [HEIGHT, WIDTH], "counts": [20, 2, 26]}
TRIANGLE = [1, 1, 5, 1, 1, 4]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=7)
        | st.dictionaries(
            st.sampled_from(["bbox", "segmentation", "keypoints", "size", "counts"]), inner
        )
    ),
    max_leaves=20,
)


def annotation(**changes: Any) -> dict[str, Any]:
    return {"bbox": [1, 1, 4, 3], "segmentation": [TRIANGLE], "keypoints": [1, 1, 2], **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"segmentation": RLE},
        {"segmentation": {**RLE, "counts": mask_util.frPyObjects(RLE, HEIGHT, WIDTH)["counts"]}},
        {"segmentation": None},
        {"segmentation": []},
        {"segmentation": [np.array(TRIANGLE, np.float32)], "bbox": np.array([1.0, 1, 4, 3])},
        {"segmentation": [[9, 1, 12, 1, 9, 4], TRIANGLE]},
        {"bbox": [-1, -1, 20, 20]},
        {"bbox": [1, 1, 0.1, 0.1]},
        {"keypoints": []},
        {"keypoints": np.zeros((1, 3))},
    ],
)
def test_what_can_be_trained_on(changes: dict[str, Any]) -> None:
    assert annotation_faults(annotation(**changes), WIDTH, HEIGHT, 1) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"bbox": None}, "box-missing"),
        ({"bbox": [1, 1, 4]}, "box-format"),
        ({"bbox": [1, 1, 4, True]}, "box-format"),
        ({"bbox": "1 1 4 3"}, "box-format"),
        ({"bbox": [1, 1, NAN, 3]}, "non-finite"),
        ({"bbox": [1, 1, 10**400, 3]}, "non-finite"),
        ({"bbox": [5, 4, -4, -3]}, "box-negative"),
        ({"bbox": [1, 1, 4, 0]}, "box-empty"),
        ({"bbox": [8, 1, 4, 3]}, "box-outside"),
        ({"bbox": [-4, 1, 4, 3]}, "box-outside"),
        ({"segmentation": 3}, "mask-format"),
        ({"segmentation": "RLE"}, "mask-format"),
        ({"segmentation": np.zeros((HEIGHT, WIDTH), bool)}, "mask-format"),
        ({"segmentation": TRIANGLE}, "polygon-format"),
        ({"segmentation": [[1, 1, 5, 1, 1, "4"]]}, "polygon-format"),
        ({"segmentation": [[[1, 1], [5, 1], [1, 4]]]}, "polygon-format"),
        ({"segmentation": [[1, 1, 5, 1]]}, "polygon-short"),
        ({"segmentation": [TRIANGLE, []]}, "polygon-short"),
        ({"segmentation": [[*TRIANGLE, 2]]}, "polygon-odd"),
        ({"segmentation": [[1, 1, 5, 1, 1, INF]]}, "non-finite"),
        ({"segmentation": [[8, 1, 12, 1, 9, 4]]}, "polygon-outside"),
        ({"segmentation": [[1, 1, 1e9, 1, 1, 4]]}, "polygon-outside"),
        ({"segmentation": {"counts": RLE["counts"]}}, "rle-format"),
        ({"segmentation": {**RLE, "counts": [20, -2, 30]}}, "rle-format"),
        ({"segmentation": {**RLE, "counts": [20, 2.0, 26]}}, "rle-format"),
        ({"segmentation": {**RLE, "counts": "~~~"}}, "rle-format"),
        ({"segmentation": {**RLE, "counts": "äö"}}, "rle-format"),
        ({"segmentation": {**RLE, "counts": "o"}}, "rle-format"),  # says that it goes on
        ({"segmentation": {**RLE, "counts": "ooooooooo0"}}, "rle-format"),
        ({"segmentation": {**RLE, "counts": ""}}, "rle-format"),
        ({"segmentation": {**RLE, "size": [WIDTH, HEIGHT]}}, "rle-size"),
        ({"segmentation": {**RLE, "counts": [20, 2, 27]}}, "rle-sum"),
        ({"segmentation": {**RLE, "counts": []}}, "rle-sum"),
        ({"segmentation": {**RLE, "counts": [48]}}, "mask-empty"),
        ({"keypoints": [1, 1, 2] * 2}, "keypoint-count"),
        ({"keypoints": [1, 1]}, "keypoint-count"),
        ({"keypoints": [1, 1, "2"]}, "keypoint-format"),
        ({"keypoints": [[1, 1, 2]]}, "keypoint-format"),
        ({"keypoints": [1, NAN, 2]}, "keypoint-format"),
    ],
)
def test_what_cannot(changes: dict[str, Any], kind: str) -> None:
    faults = annotation_faults(annotation(**changes), WIDTH, HEIGHT, 1)
    assert [k for k, _ in faults] == [kind]


def test_a_mask_may_be_needed_but_not_of_a_crowd() -> None:
    for nothing in ({}, {"segmentation": None}, {"segmentation": []}):
        bare = {"bbox": [1, 1, 4, 3], **nothing}
        assert annotation_faults(bare, WIDTH, HEIGHT) == []
        for needed in (bare, {**bare, "iscrowd": 1}):
            ((_, reason),) = annotation_faults(needed, WIDTH, HEIGHT, needs_mask=True)
            assert reason == "no segmentation"


def test_each_part_is_reported() -> None:
    broken = annotation(bbox=None, segmentation=[[1]], keypoints=[1])
    kinds = [kind for kind, _ in annotation_faults(broken, WIDTH, HEIGHT)]
    assert kinds == ["box-missing", "polygon-odd", "keypoint-count"]


@settings(deadline=None)
@given(
    hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.integers(0, 1)
    )
)
def test_compressed_counts_are_pycocotools(mask: np.ndarray) -> None:
    counts = rle_counts(mask_util.encode(np.asfortranarray(mask))["counts"].decode())
    assert counts is not None
    decoded = np.repeat(np.arange(len(counts)) % 2, counts).reshape(mask.shape, order="F")
    np.testing.assert_array_equal(decoded, mask)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_any_json_value_is_answered(value: object) -> None:
    for candidate in (
        value,
        {"bbox": [1, 1, 4, 3], "segmentation": value},
        annotation(keypoints=value),
    ):
        faults = annotation_faults(candidate, WIDTH, HEIGHT, 1, needs_mask=True)
        assert all(isinstance(reason, str) for _, reason in faults)


@settings(deadline=None)
@given(st.binary(max_size=30) | st.text(alphabet="".join(map(chr, range(48, 112))), max_size=30))
def test_what_passes_is_what_pycocotools_decodes(counts: str | bytes) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": counts}
    if not annotation_faults(annotation(segmentation=rle), WIDTH, HEIGHT):
        assert mask_util.decode(rle).any()


def test_long_values_make_short_messages() -> None:
    for value in ("x" * 10**5, [1.5] * 10**5, json.loads("[" * 900 + "]" * 900), 10**5000):
        ((_, reason),) = annotation_faults(annotation(bbox=value), WIDTH, HEIGHT)
        assert len(reason) < 200
