"""Whole models under CUDA's rules: nothing mixes, and no step waits, copies or launches needlessly.

Counts do not depend on widths, so models are narrow. A budget that is exceeded shows the lines.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from benchmark.counts import (
    NARROW,
    NARROW_FPN,
    NARROW_KEYPOINT,
    NARROW_MASK,
    batch,
    inference,
    training_step,
)
from benchmark.cuda_rules import Cost, CudaRules
from benchmark.peers import stock_detectron2
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config, optimize_for_inference
from mask_rcnn_plugin.evaluation.testing import evaluate
from mask_rcnn_plugin.training import setup_datasets

ALL_MASKS = [*NARROW_FPN, NARROW_MASK]
C4 = [
    "model.backbone.width=8",
    "model.proposal_generator.post_nms_topk=[200,100]",
    "model.roi_heads.mask_head.conv_dims=[16]",
]
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "FPN": ("table2a_backbone/r50_fpn", ALL_MASKS),
    "C4": ("table2a_backbone/r50_c4", C4),
    "C5": ("table2d_stride32/roialign", [*NARROW, NARROW_MASK]),
    "keypoints": ("table4_keypoints/keypoint_and_mask", [*ALL_MASKS, NARROW_KEYPOINT]),
    "keypoints alone": ("table4_keypoints/keypoint_only", [*NARROW_FPN, NARROW_KEYPOINT]),
    "boxes": (
        "table3_box/faster_rcnn_r101_fpn",
        [*NARROW_FPN, "model.backbone.name=ResNet-50-FPN"],
    ),
    "softmax": (
        "table2b_mask_loss/softmax",
        C4,
    ),
    "MLP": (
        "table2e_mask_branch/mlp_2fc",
        [*NARROW_FPN, "model.roi_heads.mask_head.fc_dims=[16,16]", "model.roi_heads.num_classes=3"],
    ),
    "agnostic": (
        "class_agnostic/r50_c4",
        C4,
    ),
    "RoIWarp": (
        "table2c_roi_layer/roiwarp_max",
        C4,
    ),
}


def build(family: str, **changes: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model that finds things, and what it is trained on."""
    config = get_config(*FAMILIES[family]).model
    for key, value in changes.items():
        config[key] = value
    model, images = instantiate(config), batch("keypoint" in family)
    for image in images:
        image["instances"].gt_classes %= model.roi_heads.num_classes
    draw_like_trained(model, images, num_candidates=300)
    return model, images


def within(cost: Cost, waits: int, copies: int, operators: int) -> None:
    allowed = (waits, copies, operators)
    for count, limit in zip(cost.totals(), allowed):
        assert count <= limit, f"{cost.totals()}, allowed are {allowed}\n{cost.lines()}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_that_of_a_cpu(family: str, assert_near: Callable[..., None]) -> None:
    model, images = build(family)
    theirs = copy.deepcopy(model).train()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    torch.manual_seed(0)
    with EventStorage():
        for _ in range(2):
            optimizer.zero_grad()
            expected = theirs(images)
            sum(expected.values()).backward()
            optimizer.step()
    torch.manual_seed(0)
    cost, losses = training_step(model, images)
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert_near(losses[name], loss, name, tolerance=1e-4)
    within(cost, 8 + ("keypoints" in family), 3, 1000 + 150 * ("keypoints" in family))


@pytest.mark.parametrize(
    ("family", "mask_format"), [*((family, "rle") for family in FAMILIES), ("FPN", "bitmap")]
)
def test_detections_are_those_of_a_cpu(family: str, mask_format: str) -> None:
    model, images = build(family, mask_format=mask_format)
    with torch.no_grad():
        expected = [r["instances"] for r in model.eval()([{**x} for x in images])]
    _, results = inference(model, images)
    for i, j in zip(results, expected, strict=True):
        assert len(i) == len(j) > 5
        assert i.get_fields().keys() == j.get_fields().keys()
        assert i.pred_classes.equal(j.pred_classes)
        assert torch.allclose(i.pred_boxes.tensor, j.pred_boxes.tensor, atol=1e-3)
        if i.has("pred_masks"):  # to rounding: CUDA's way to pool or to paste is another
            differ = np.asarray(i.pred_masks) != np.asarray(j.pred_masks)
            assert differ.mean() < 1e-3


@pytest.mark.parametrize("family", ["FPN", "C4", "keypoints"])
@pytest.mark.parametrize("is_optimized", [False, True])
def test_nothing_mixes_in_half_precision(family: str, is_optimized: bool) -> None:
    model, images = build(family)
    with CudaRules(), torch.autocast("cuda", torch.bfloat16), EventStorage():
        model.to("cuda")
        if is_optimized:
            model = optimize_for_inference(model.eval())
            with torch.no_grad():
                assert len(model(images)[0]["instances"]) > 5
        else:
            losses = model.train()(images)
            assert all(loss.isfinite() for loss in losses.values())


def test_steps_cost_no_more_than_allowed() -> None:
    model, images = build("FPN")
    within(training_step(model, images)[0], waits=6, copies=3, operators=980)
    within(inference(model, images)[0], waits=8, copies=3, operators=550)


@pytest.mark.parametrize("count", [training_step, inference])
def test_keypoints_cost_little_more(count: Callable[..., Any]) -> None:
    masks, more = (count(*build(family))[0].totals() for family in ("FPN", "keypoints"))
    waits, copies, operators = (b - a for a, b in zip(masks, more))
    assert waits <= 3
    assert copies == 0
    assert operators <= 270


def test_detectron2_costs_more() -> None:
    """What is counted is not nothing."""
    config = get_config(*FAMILIES["FPN"]).model
    stock, images = stock_detectron2(config), batch()
    draw_like_trained(stock, images, num_candidates=300)
    cost = training_step(stock, images)[0]
    assert cost.waits.total() > 60
    assert cost.copies.total() > 15
    assert cost.operators.total() > 1400
    assert inference(stock, images)[0].waits.total() > 40


def test_statistics_cost_a_wait_each_when_they_are_due() -> None:
    model, images = build("FPN")
    with CudaRules() as cuda:
        model.to("cuda").train()
        waits = []
        for iteration in (17, 18, 19):
            with EventStorage(iteration), cuda.counted() as cost:
                model(images)
            waits.append(cost.waits.total())
    assert waits[0] == waits[1] == waits[2] - 2


def test_many_candidates_cost_no_more_than_detectron2() -> None:
    """Of all images together there are too many for one NMS."""
    config = get_config(*FAMILIES["FPN"]).model
    waits = []
    for model in (instantiate(config), stock_detectron2(config)):
        predictor = model.roi_heads.box_predictor
        predictor.test_score_thresh = 0.0
        with CudaRules() as cuda, torch.no_grad():
            logits, deltas = torch.randn(400, 81).to("cuda"), torch.randn(400, 320).to("cuda")
            corners = torch.rand(50, 2).to("cuda") * 100
            boxes = Boxes(torch.cat([corners, corners + 50], dim=1))
            images = [Instances((150, 200), proposal_boxes=boxes) for _ in range(8)]
            with cuda.counted() as cost:
                predictor.inference((logits, deltas), images)
        waits.append(cost.waits.total())
    assert waits[0] <= waits[1] + 1


def test_pictures_of_the_training_are_drawn() -> None:
    model, images = build("FPN")
    model.vis_period = 1  # type: ignore[assignment]
    with CudaRules(), EventStorage(1) as storage:
        model.to("cuda").train()(images)
        assert len(storage._vis_data) == 1


def test_an_evaluation_reads_a_batch_a_few_times(toy_overrides: list[str]) -> None:
    overrides = [*toy_overrides, "dataloader.test.num_workers=0"]
    cfg = get_config("table5_multitask/keypoint_and_mask+ablation", overrides)
    setup_datasets(cfg)
    Path(cfg.train.output_dir).mkdir(parents=True)
    with CudaRules() as cuda:
        model = instantiate(cfg.model).to("cuda").eval()
        model.roi_heads.box_predictor.test_score_thresh = 0.0
        with cuda.counted() as cost:
            results = evaluate(cfg, model)
    assert set(results) == {"bbox", "segm", "keypoints"}
    # 6 images: 13 of the model at most, and what is found goes to the host.
    assert cost.waits.total() <= 6 * (13 + 6), cost.lines()
