"""What is passed over many at a time is what `inspect` finds nothing in."""

import copy
import json
import random
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from mask_rcnn_plugin.data.annotation_file import Annotation
from mask_rcnn_plugin.data.check import plain
from mask_rcnn_plugin.data.check.annotations import Context, inspect

WIDTH, HEIGHT = 60, 40
decode = msgspec.json.Decoder(Annotation).decode
CONTEXT = Context({1: (WIDTH, HEIGHT)}, {1: True, 2: False, 3: None}, num_keypoints=2)


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def sound(**changes: Any) -> dict[str, Any]:
    annotation = {
        **{"id": 7, "image_id": 1, "category_id": 2, "bbox": [10, 5, 20, 20], "area": 400},
        **{"iscrowd": 0, "segmentation": [square(10, 5, 20)]},
    }
    return annotation | changes


PERSON = sound(category_id=1, keypoints=[10, 5, 2, 0, 0, 0], num_keypoints=1)
TWO_PARTS = sound(bbox=[0, 0, 40, 10], area=200, segmentation=[square(0, 0, 10), square(30, 0, 10)])


def passed_over(annotations: list[Any], context: Context = CONTEXT) -> list[bool]:
    entries = [decode(json.dumps(annotation)) for annotation in annotations]
    return [bool(none) for none in plain.nothing_to_find(entries, context)]


def test_sound_ones_are_passed_over() -> None:
    annotations = [sound(), PERSON, TWO_PARTS, sound(segmentation=[])]
    assert not any(inspect(annotation, CONTEXT) for annotation in annotations)
    assert passed_over(annotations) == [True] * 4
    needs_mask = Context(CONTEXT.images, CONTEXT.categories, 2, needs_mask=True)
    assert passed_over(annotations, needs_mask) == [True, True, True, False]
    assert passed_over([]) == []
    assert passed_over([sound(segmentation=[])]) == [True]


@pytest.mark.parametrize("base", [sound(), PERSON, TWO_PARTS], ids=["mask", "person", "parts"])
def test_none_in_which_something_is_found_is_passed_over(base: dict[str, Any]) -> None:
    """Numbers changed at random, often to what is at a limit."""
    draw = random.Random(0)
    values = [-2, -1, -0.5, 0, 0.5, 1, 2, 3, WIDTH, WIDTH + 1, WIDTH + 2, HEIGHT, HEIGHT + 1.5, 999]
    changed = []
    for _ in range(3000):
        annotation = copy.deepcopy(base)
        for _ in range(draw.choice([1, 1, 2, 3])):
            key = draw.choice(sorted(annotation))
            owner, place = annotation, key
            while isinstance(owner[place], list) and owner[place]:
                owner, place = owner[place], draw.randrange(len(owner[place]))
            if isinstance(owner, list) and draw.random() < 0.1:
                del owner[place]
            else:
                owner[place] = draw.choice(values) if draw.random() < 0.7 else owner[place] * 1.1
        try:
            decode(json.dumps(annotation))
        except ValueError:
            continue
        changed.append(annotation)
    passed = [a for a, none in zip(changed, passed_over(changed)) if none]
    assert len(passed) > 50
    assert [a for a in passed if inspect(a, CONTEXT)] == []


@pytest.mark.parametrize(
    "change",
    [
        *({"iscrowd": 1}, {"ignore": 1}, {"id": 2**63}, {"image_id": True}, {"bbox": [1, 2, 3]}),
        *({"keypoints": None}, {"segmentation": {"size": [40, 60], "counts": ""}}, {"area": "1"}),
    ],
)
def test_what_is_not_plain_is_inspected(change: dict[str, Any]) -> None:
    with suppress(msgspec.ValidationError):  # it has no place in an `Annotation`
        assert passed_over([sound(**change)]) == [False]
