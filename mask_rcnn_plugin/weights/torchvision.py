"""torchvision's ResNets and R-CNNs: names and rows that the same weights have in detectron2."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mask_rcnn_plugin.weights.files import WeightsError

_SCORES, _BOXES = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
_MASKS, _KEYPOINTS = "roi_heads.mask_head.predictor", "roi_heads.keypoint_head"


def _backbone_names() -> dict[str, str]:
    names = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    for stage in range(1, 5):
        for block in range(36):  # in layer3 of a ResNet-152
            theirs, ours = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            for n in range(1, 4):
                names[f"{theirs}.conv{n}"] = f"{ours}.conv{n}"
                names[f"{theirs}.bn{n}"] = f"{ours}.conv{n}.norm"
            names[f"{theirs}.downsample.0"] = f"{ours}.shortcut"
            names[f"{theirs}.downsample.1"] = f"{ours}.shortcut.norm"
    in_detectors = {f"backbone.body.{k}": f"backbone.bottom_up.{v}" for k, v in names.items()}
    return {**names, "fc": "linear", **in_detectors}


# torchvision's modules, and detectron2's.
_NAMES = {
    **_backbone_names(),
    **{f"backbone.fpn.inner_blocks.{i}.0": f"backbone.fpn_lateral{i + 2}" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0": f"backbone.fpn_output{i + 2}" for i in range(4)},
    "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
    "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
    _SCORES: _SCORES,
    _BOXES: _BOXES,
    **{f"roi_heads.mask_head.{i}.0": f"roi_heads.mask_head.mask_fcn{i + 1}" for i in range(4)},
    "roi_heads.mask_predictor.conv5_mask": "roi_heads.mask_head.deconv",
    "roi_heads.mask_predictor.mask_fcn_logits": _MASKS,
    **{f"{_KEYPOINTS}.{2 * i}": f"{_KEYPOINTS}.conv_fcn{i + 1}" for i in range(8)},
    "roi_heads.keypoint_predictor.kps_score_lowres": f"{_KEYPOINTS}.score_lowres",
}
# Those of torchvision before 0.13, which its published files have.
_OLD_NAMES = {
    "rpn.head.conv": "proposal_generator.rpn_head.conv",
    **{f"backbone.fpn.inner_blocks.{i}": f"backbone.fpn_lateral{i + 2}" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}": f"backbone.fpn_output{i + 2}" for i in range(4)},
    **{f"roi_heads.mask_head.mask_fcn{i}": f"roi_heads.mask_head.mask_fcn{i}" for i in range(1, 5)},
}
# Rows of the background's boxes and masks, which torchvision has first and never reads. detectron2
# has none; a file keeps them under another name.
_BACKGROUND_ROWS, _UNUSED = {_BOXES: 4, _MASKS: 1}, "torchvision."
EPS = 1e-5  # of both libraries' batch norm


def from_torchvision(weights: Mapping[str, Tensor], *, eps: float = EPS) -> dict[str, Tensor]:
    """Weights of a torchvision model as detectron2 has them.

    Args:
        weights: state dict of a ResNet or ResNeXt, or of a Faster, Mask or Keypoint R-CNN on one
            with an FPN, of any version of torchvision.
        eps: of its batch norm; what differs from detectron2's is added to the variances.

    Returns:
        By detectron2's names. A ResNet's have no prefix, as all ImageNet weights for detectron2.

    Raises:
        WeightsError: if there is a weight that these models do not have.
    """
    found = _renamed(weights, {**_OLD_NAMES, **_NAMES}, "torchvision")
    for name, value in [*found.items()]:
        module, _, kind = name.rpartition(".")
        if module == _SCORES:
            found[name] = value.roll(-1, dims=0)
        elif rows := _BACKGROUND_ROWS.get(module):
            found[name], found[_UNUSED + name] = value[rows:], value[:rows]
        elif kind == "running_var" and eps != EPS:
            found[name] = value + (eps - EPS)
    return found


def to_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, by the names of torchvision since 0.13, for the eps that its models have.

    Background rows, which torchvision never reads, are 0 where the file lacks them, as after a
    training.

    Raises:
        WeightsError: if there is a weight that these models do not have, or if boxes or masks are
            not one for each class.
    """
    found = {name: value for name, value in weights.items() if not name.startswith(_UNUSED)}
    num_classes = len(weights.get(f"{_SCORES}.bias", ())) - 1
    for name, value in [*found.items()]:
        module = name.rpartition(".")[0]
        if module == _SCORES:
            found[name] = value.roll(1, dims=0)
        elif rows := _BACKGROUND_ROWS.get(module):
            if len(value) != rows * num_classes:
                raise WeightsError(
                    f"{name} has {len(value)} rows, must have {rows} for each of {num_classes} "
                    "classes, as torchvision knows no class-agnostic boxes and masks"
                )
            background = weights.get(_UNUSED + name, torch.zeros_like(value[:rows]))
            found[name] = torch.cat([background, value])
    return _renamed(found, {ours: theirs for theirs, ours in _NAMES.items()}, "detectron2")


def _renamed(
    weights: Mapping[str, Tensor], names: Mapping[str, str], library: str
) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module not in names:
            raise WeightsError(
                f"the weights have {name!r}, which no {library} ResNet and no Faster, Mask or "
                "Keypoint R-CNN (v1) on a ResNet with an FPN has: other models cannot be converted"
            )
        found[f"{names[module]}.{kind}"] = value
    return found
