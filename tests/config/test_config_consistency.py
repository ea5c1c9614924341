"""Keys that do not go together are refused before anything is built, by their names."""

from pathlib import Path

import pytest

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.errors import ConfigError

BASE = "table2a_backbone/r50_fpn"
METRIC = "train.best_metric"
PREDICTOR = "model.roi_heads.box_predictor.test_topk_per_image"
EVALUATOR = "dataloader.evaluator.max_detections"


def refused(config: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        get_config(config, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("config", "override", "task", "head"),
    [
        (BASE, "model.roi_heads.mask_head=null", "segm", "mask_head"),
        ("table2a_backbone/r50_c4", "model.roi_heads.mask_head=null", "segm", "mask_head"),
        (
            "table3_box/faster_rcnn_r101_fpn",
            "dataloader.evaluator.tasks=[bbox, segm]",
            "segm",
            "mask_head",
        ),
        (BASE, "dataloader.evaluator.tasks=[bbox, keypoints]", "keypoints", "keypoint_head"),
        (
            "table2a_backbone/r50_c4",
            "dataloader.evaluator.tasks=[keypoints]",
            "keypoints",
            "keypoint_head",
        ),
    ],
)
def test_a_task_without_its_branch_is_refused(
    config: str, override: str, task: str, head: str
) -> None:
    expected = f"tasks has {task!r}, but there is no model.roi_heads.{head} "
    assert expected in refused(config, override)


def test_a_branch_that_is_not_scored_is_taken() -> None:
    overrides = ["model.roi_heads.mask_head=null", "dataloader.evaluator.tasks=[bbox]"]
    get_config(BASE, overrides)
    get_config(BASE, overrides[1:])


@pytest.mark.parametrize(
    "metric", ["segm/APP", "segm/ap", "segm", "AP", "keypoints/AP", "bbox/AR@100", "5", "0", "true"]
)
def test_a_metric_that_no_evaluation_gives_is_refused(metric: str) -> None:
    assert f"{METRIC} is " in refused(BASE, f"{METRIC}={metric}")


@pytest.mark.parametrize("metric", ["segm/AP", "bbox/APs", "segm/AP-person", "null", ""])
def test_a_metric_of_the_evaluation_is_taken(metric: str) -> None:
    get_config(BASE, [f"{METRIC}={metric}"])


def test_metrics_of_keypoints_and_proposals() -> None:
    keypoints, proposals = "table5_multitask/keypoint_only", "dataloader.evaluator.tasks"
    get_config(keypoints, [f"{METRIC}=keypoints/APm"])
    assert "keypoints/APs" in refused(keypoints, f"{METRIC}=keypoints/APs")
    get_config(BASE, [f"{proposals}=[box_proposals]", f"{METRIC}=box_proposals/ARs@1000"])
    assert METRIC in refused(BASE, f"{proposals}=[box_proposals]", f"{METRIC}=box_proposals/AP")


@pytest.mark.parametrize("overlay", ["", "+synthetic", "+ablation"])
@pytest.mark.parametrize("key", [PREDICTOR, EVALUATOR])
def test_a_second_limit_of_detections_is_refused(key: str, overlay: str) -> None:
    message = refused(BASE + overlay, f"{key}=50")
    assert f"{key} is 50, but dataset.test.max_detections is " in message
    get_config(BASE + overlay, [f"{key}=50", "dataset.test.max_detections=50"])


def test_nothing_is_asked_of_what_is_not_the_plugins(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"""
from detectron2.config import LazyCall as L
from detectron2.modeling.roi_heads import StandardROIHeads
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator

class Heads(StandardROIHeads):
    __module__ = "mine"
    def __init__(self, my_branch, **kwargs): ...

class Evaluator(MaskRCNNCOCOEvaluator):
    __module__ = "mine"

names = ("model", "dataset", "dataloader", "optimizer", "lr_multiplier", "train")
model, dataset, dataloader, optimizer, lr_multiplier, train = (
    get_config({BASE!r})[name] for name in names
)
model.roi_heads = L(Heads)(my_branch=1)
dataloader.evaluator._target_ = Evaluator
train.best_metric = "segm/boundary"
"""
    )
    get_config(str(file), ["dataset.test.max_detections=80"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.proposal_generator.post_nms_topk=[1]", "post_nms_topk is [1], must be two numbers"),
        ("model.proposal_generator.pre_nms_topk=[1,2,3]", "is [1, 2, 3], must be two numbers"),
        (
            "model.pixel_mean=[1,2]",
            "model.pixel_mean is [1, 2], model.pixel_std is [1.0, 1.0, 1.0]",
        ),
        (
            "model.roi_heads.mask_pooler.scales=[0.25]",
            "model.roi_heads.mask_pooler.scales is [0.25], model.roi_heads.mask_in_features is "
            "['p2', 'p3', 'p4', 'p5']: one needs as many as the other",
        ),
        ("model.roi_heads.box_in_features=[]", "model.roi_heads.box_in_features is []"),
        (
            "optimizer.params.bias_lr_factor=2.0",
            "bias_lr_factor is 2.0, but optimizer.params.base_lr is not set: give it too, as "
            "optimizer.lr, 0.02",
        ),
        ("dataloader.train.mapper.is_train=false", "mapper.is_train is False, must be True"),
        ("dataloader.test.mapper.is_train=true", "mapper.is_train is True, must be False"),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, said: str) -> None:
    assert said in refused(BASE, override)


def test_a_factor_of_the_biases_goes_with_a_rate() -> None:
    params = "optimizer.params"
    get_config(BASE, [f"{params}.bias_lr_factor=2.0", f"{params}.base_lr=0.02"])
