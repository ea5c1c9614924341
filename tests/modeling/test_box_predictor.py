"""The box predictor against detectron2's own."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from mask_rcnn_plugin.modeling import MaskRCNNBoxPredictor, box_predictor

Check = Callable[..., None]
K = 4
SIZES = [(90, 128), (60, 100), (70, 70)]


def pair(**changes: object) -> tuple[MaskRCNNBoxPredictor, FastRCNNOutputLayers]:
    arguments = {
        "box2box_transform": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        "num_classes": K,
        "test_score_thresh": 0.2,
        "test_topk_per_image": 12,
        "smooth_l1_beta": 0.5,
        "loss_weight": {"loss_box_reg": 3.0},
    } | changes
    predictors = [
        kind(ShapeSpec(channels=6), **arguments)
        for kind in (MaskRCNNBoxPredictor, FastRCNNOutputLayers)
    ]
    return predictors[0], predictors[1]


def proposals(*counts: int, with_objects: tuple[bool, ...] = (True, True, True)) -> list[Instances]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for n, size, has_objects in zip(counts, SIZES, with_objects):
        corners = torch.rand(n, 2, 2, generator=generator) * torch.tensor(size[::-1])
        boxes = Boxes(torch.cat([corners.amin(1), corners.amax(1) + 3], dim=1))
        of_image = Instances(size, proposal_boxes=boxes)
        of_image.gt_classes = torch.full((n,), K)
        if has_objects:
            of_image.gt_classes = torch.randint(K + 1, (n,), generator=generator)
            of_image.gt_boxes = Boxes(boxes.tensor + torch.randn(n, 4, generator=generator))
        found.append(of_image)
    return found


def predictions(rows: int, columns: int = 4 * K) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, K + 1, generator=generator) * 2
    deltas = torch.randn(rows, columns, generator=generator)
    return logits.requires_grad_(), deltas.requires_grad_()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cls_agnostic_bbox_reg": True},
        {"box_reg_loss_type": "giou"},
        {"use_sigmoid_ce": True},
        {"smooth_l1_beta": 0.0},
    ],
    ids=["paper", "agnostic", "giou", "sigmoid", "l1"],
)
@pytest.mark.parametrize("with_objects", [(True, True, True), (True, False, True), (False,) * 3])
def test_losses_and_gradients_agree(
    changes: dict[str, object], with_objects: tuple[bool, ...], assert_near: Check
) -> None:
    columns = 4 if changes.get("cls_agnostic_bbox_reg") else 4 * K
    given = proposals(20, 1, 15, with_objects=with_objects)
    results = []
    for predictor in pair(**changes):
        outputs = predictions(36, columns)
        with EventStorage():
            losses = predictor.losses(outputs, copy.deepcopy(given))
        sum(losses.values()).backward()
        results.append((losses, [x.grad for x in outputs]))
    (losses, grads), (expected, expected_grads) = results
    assert losses.keys() == expected.keys() == {"loss_cls", "loss_box_reg"}
    for name, loss in expected.items():
        assert_near(losses[name], loss, name)
    assert bool(expected["loss_box_reg"] > 0) == any(with_objects)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_near(grad, expected_grad, least=1e-4)


@pytest.mark.parametrize("given", [[], [0, 0]])
def test_losses_of_nothing(given: list[int]) -> None:
    for predictor in pair():
        outputs = predictions(0)
        with EventStorage():
            losses = predictor.losses(outputs, proposals(*given)) if given else None
        if losses:
            assert [loss.item() for loss in losses.values()] == [0, 0]


def test_statistics_are_detectron2s_when_they_are_written() -> None:
    seen = []
    for predictor in pair():
        for iteration in range(20):
            with EventStorage(iteration) as storage:
                predictor.losses(predictions(36), proposals(20, 1, 15))
            if iteration == 18 and isinstance(predictor, MaskRCNNBoxPredictor):
                assert not storage.latest()
        seen.append({name: value for name, (value, _) in storage.latest().items()})
    ours, theirs = seen
    names = ("cls_accuracy", "fg_cls_accuracy", "false_negative")
    assert set(theirs) == {f"fast_rcnn/{name}" for name in names}
    assert ours == pytest.approx(theirs)
    assert 0 < theirs["fast_rcnn/fg_cls_accuracy"] < 1


def detections(predictor: FastRCNNOutputLayers, outputs: tuple[Tensor, Tensor], *counts: int):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return predictor.inference(outputs, proposals(*counts))


def same_detections(ours: tuple, theirs: tuple) -> None:
    for i, j, kept, expected in zip(ours[0], theirs[0], ours[1], theirs[1], strict=True):
        assert i.image_size == j.image_size
        assert i.get_fields().keys() == j.get_fields().keys()
        assert kept.equal(expected)
        assert i.pred_classes.equal(j.pred_classes)
        assert torch.allclose(i.scores, j.scores)
        assert torch.allclose(i.pred_boxes.tensor, j.pred_boxes.tensor, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cls_agnostic_bbox_reg": True},
        {"test_score_thresh": 0.0},
        {"test_topk_per_image": -1},
        {"test_topk_per_image": 0},
        {"test_score_thresh": 1.0},
        {"use_sigmoid_ce": True},
    ],
    ids=["paper", "agnostic", "all", "endless", "none", "nothing", "sigmoid"],
)
@pytest.mark.parametrize("counts", [(20, 1, 15), (0, 20, 0), (0, 0)])
def test_detections_agree(changes: dict[str, object], counts: tuple[int, ...]) -> None:
    columns = 4 if changes.get("cls_agnostic_bbox_reg") else 4 * K
    ours, theirs = pair(**changes)
    outputs = predictions(sum(counts), columns)
    results, expected = (detections(p, outputs, *counts) for p in (ours, theirs))
    same_detections(results, expected)
    if not changes and counts[0]:
        assert [len(i) for i in expected[0]] == [12, 2, 12]


def test_rows_that_are_not_finite_are_left_out() -> None:
    outputs, given = predictions(36), proposals(20, 1, 15)
    outputs[0].data[3, 1] = math.nan
    outputs[1].data[22, 5] = math.nan
    given[0].proposal_boxes.tensor[19, 0] = math.inf
    ours, theirs = pair(test_score_thresh=0.0, test_topk_per_image=-1)
    with torch.no_grad():
        results, expected = (p.inference(outputs, given) for p in (ours, theirs))
    # detectron2 counts the rows that are left.
    same_detections((results[0], expected[1]), expected)
    assert not {3, 19} & set(results[1][0].tolist())
    assert 1 not in results[1][2].tolist()


def crowded(num_images: int, num_classes: int) -> tuple[tuple[Tensor, Tensor], list[Instances]]:
    """Boxes in clusters, each of one of the last two classes."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(num_images * 3, 2, generator=generator) * 700
    boxes = torch.cat([corners, corners + 25], dim=1).repeat_interleave(4, dim=0)
    boxes += torch.randn(boxes.shape, generator=generator) * 4
    classes = torch.randint(num_classes - 2, num_classes, (len(boxes),), generator=generator)
    logits = torch.full((len(boxes), num_classes + 1), -9.0)
    logits[range(len(boxes)), classes] = 3 + 3 * torch.rand(len(boxes), generator=generator)
    given = [Instances((800, 1333), proposal_boxes=Boxes(b)) for b in boxes.split(12)]
    return (logits, torch.zeros(len(boxes), 4 * num_classes)), given


@pytest.mark.parametrize(("num_images", "at_once"), [(16, 25_000), (1, 25_000), (3, 20)])
def test_many_classes_and_images(
    num_images: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NMS for all of them decides as one for each image, or image by image if they are many."""
    monkeypatch.setattr(box_predictor, "BOXES_AT_ONCE", at_once)
    outputs, given = crowded(num_images, 1203)
    ours, theirs = pair(num_classes=1203, test_score_thresh=0.05)
    with torch.no_grad():
        results, expected = (p.inference(outputs, given) for p in (ours, theirs))
    same_detections(results, expected)
    assert num_images < sum(map(len, expected[0])) < 12 * num_images


def test_boxes_of_ones_own() -> None:
    class Moved:
        def predict_boxes(self, *args):  # type: ignore[no-untyped-def]
            return [boxes + 5 for boxes in super().predict_boxes(*args)]

    ours, theirs = pair()
    for predictor in (ours, theirs):
        predictor.__class__ = type("Own", (Moved, type(predictor)), {})
    outputs = predictions(36)
    results, expected = (detections(p, outputs, 20, 1, 15) for p in (ours, theirs))
    same_detections(results, expected)
