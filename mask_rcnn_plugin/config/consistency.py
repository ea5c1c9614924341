"""What the keys of a config must agree in, each of them right by itself."""

from typing import Any

from mask_rcnn_plugin.config.call_signature import is_call
from mask_rcnn_plugin.errors import ConfigError

_BRANCHES = {"segm": "mask_head", "keypoints": "keypoint_head"}
_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_METRICS = {
    "bbox": _AP,
    "segm": _AP,
    "keypoints": tuple(name for name in _AP if name != "APs"),
    "box_proposals": tuple(f"AR{area}@{n}" for n in (100, 1000) for area in ("", "s", "m", "l")),
}
_FOLLOWING_MAX_DETECTIONS = (
    "model.roi_heads.box_predictor.test_topk_per_image",
    "dataloader.evaluator.max_detections",
)


def check_consistency(values: dict[str, Any]) -> None:
    """
    Args:
        values: a config, resolved, its keys, types and ranges checked.

    Raises:
        ConfigError: for a task that the model has no branch for, a metric for the best model that
            no task gives, lists whose lengths do not go together, a mapper of the other split, a
            factor without what it multiplies, and two limits of detections where there is one.
    """
    _check_branches(values)
    _check_best_metric(values)
    _check_lengths(values)
    _check_mappers(values)
    factor = _at(values, "optimizer.params.bias_lr_factor")
    if factor not in (None, 1) and _at(values, "optimizer.params.base_lr") is None:
        raise ConfigError(
            f"optimizer.params.bias_lr_factor is {factor}, but optimizer.params.base_lr is not "
            f"set: give it too, as optimizer.lr, {_at(values, 'optimizer.lr')}"
        )
    limit = _at(values, "dataset.test.max_detections")
    for key in _FOLLOWING_MAX_DETECTIONS:
        if _at(values, key) not in (None, limit):
            raise ConfigError(
                f"{key} is {_at(values, key)}, but dataset.test.max_detections is {limit}: set the "
                "latter alone, which limits both the model and the evaluation"
            )


def _check_branches(values: dict[str, Any]) -> None:
    for task, head in _BRANCHES.items():
        if (
            task in (_at(values, "dataloader.evaluator.tasks") or ())
            and _is_known(_at(values, "model.roi_heads"))
            and _at(values, f"model.roi_heads.{head}") is None
        ):
            raise ConfigError(
                f"dataloader.evaluator.tasks has {task!r}, but there is no model.roi_heads.{head} "
                "to predict it: leave the task out"
            )


def _check_best_metric(values: dict[str, Any]) -> None:
    key = "train.best_metric"
    metric = _at(values, key)
    if metric in (None, ""):
        return
    if not isinstance(metric, str):
        raise ConfigError(f"{key} is {metric!r}, must be TASK/NAME, such as 'segm/AP', or null")
    if not _is_known(_at(values, "dataloader.evaluator")):
        return
    tasks = _at(values, "dataloader.evaluator.tasks") or ()
    names = [f"{task}/{name}" for task in tasks for name in _METRICS.get(task, ())]
    if metric not in names and not metric.startswith(tuple(f"{task}/AP-" for task in tasks)):
        raise ConfigError(f"{key} is {metric!r}, must be one of {names} or TASK/AP-CATEGORY")


def _check_lengths(values: dict[str, Any]) -> None:
    for key in ("pre_nms_topk", "post_nms_topk"):
        topk = _at(values, f"model.proposal_generator.{key}")
        if isinstance(topk, (list, tuple)) and len(topk) != 2:
            raise ConfigError(
                f"model.proposal_generator.{key} is {list(topk)}, must be two numbers: in training "
                "and in a test"
            )
    pairs = [("model.pixel_mean", "model.pixel_std")]
    for branch in ("", "box_", "mask_", "keypoint_"):
        heads = f"model.roi_heads.{branch}"
        pairs.append((f"{heads}pooler.scales", f"{heads}in_features"))
    for first, second in pairs:
        a, b = _at(values, first), _at(values, second)
        both = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))
        if both and (len(a) != len(b) or not a):
            raise ConfigError(f"{first} is {a}, {second} is {b}: one needs as many as the other")


def _check_mappers(values: dict[str, Any]) -> None:
    for split, expected in (("train", True), ("test", False)):
        key = f"dataloader.{split}.mapper"
        given = _at(values, f"{key}.is_train")
        if _is_known(_at(values, key)) and given not in (None, expected):
            raise ConfigError(f"{key}.is_train is {given}, must be {expected}")


def _is_known(node: Any) -> bool:
    """Whether it calls what is the plugin's or detectron2's; of others one cannot tell."""
    if not is_call(node):
        return False
    target = node["_target_"]
    module = str(getattr(target, "__module__", target))
    return module.split(".")[0] in ("mask_rcnn_plugin", "detectron2")


def _at(values: Any, key: str) -> Any:
    """A key's value; None if it is not there."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
