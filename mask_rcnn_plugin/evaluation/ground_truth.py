"""What must hold of annotations, and of predictions from a file, before they are compared."""

from collections.abc import Collection, Mapping
from typing import Any

from pycocotools.coco import COCO

from mask_rcnn_plugin.data.annotation_rules import annotation_faults, are_finite, are_numbers, shown
from mask_rcnn_plugin.data.coco import DatasetError

# Of `annotation_faults`: nothing will match such an object, but COCO's numbers are defined.
_SCORABLE = {"box-negative", "box-empty", "box-outside", "mask-empty"}

_MAX_PIXELS = 2**32 - 1  # pycocotools counts pixels in a uint32


def check_ground_truth(
    name: str, coco: COCO, tasks: Collection[str], num_keypoints: int | None = None
) -> None:
    """Refuse what COCO's implementations fail on, loop on for ever or read as something else.

    Nothing is left out instead: AP would be of another dataset.

    Args:
        name: of the dataset, for the message.
        coco: annotations of images that it does not have are not looked at, or scored.
        tasks: a mask is needed and looked at for "segm" alone.
        num_keypoints: that each list of keypoints must have; None where they are not scored.

    Raises:
        DatasetError: with the number of such annotations and the first of them.
    """
    wrong = []
    for annotation in coco.dataset.get("annotations", []):
        image = coco.imgs.get(annotation["image_id"])
        if image is None:
            continue
        reason = _annotation_error(annotation) or _error(annotation, image, tasks, num_keypoints)
        if reason:
            wrong.append(f"id {shown(annotation['id'])}: {reason}")
    if wrong:
        raise DatasetError(
            f"{len(wrong)} annotations of the test set {name!r} cannot be scored, e.g. {wrong[0]}; "
            "`python tools/check_dataset.py --json ... --images ... --fix OUT.json` writes a copy "
            "with them repaired or left out"
        )


def prediction_error(
    prediction: Mapping[str, Any],
    image: Mapping[str, Any],
    category_ids: Collection[Any],
    tasks: Collection[str],
    num_keypoints: int | None,
) -> str:
    """Why a prediction, as `read_predictions` gives it, cannot be scored; "" if it can."""
    if prediction["category_id"] not in category_ids:
        return f"the dataset has no category {shown(prediction['category_id'])}"
    if num_keypoints is not None and "keypoints" not in prediction:
        return "no keypoints"
    return _error(prediction, image, tasks, num_keypoints)


def _annotation_error(annotation: Mapping[str, Any]) -> str:
    if annotation["iscrowd"] not in (0, 1):
        return f"iscrowd is {shown(annotation['iscrowd'])}, must be 0 or 1"
    area = annotation.get("area")
    if not (are_numbers([area]) and are_finite([area])):
        return f"area is {shown(area)}, must be a number"
    return ""


def _error(
    item: Mapping[str, Any],
    image: Mapping[str, Any],
    tasks: Collection[str],
    num_keypoints: int | None,
) -> str:
    scores_masks = "segm" in tasks
    width, height = image["width"], image["height"]
    if scores_masks and width * height > _MAX_PIXELS:
        return f"masks of {width} x {height} pixels, which must be {_MAX_PIXELS} or fewer"
    used = {
        "bbox": item.get("bbox"),
        "segmentation": item.get("segmentation") if scores_masks else None,
        "keypoints": item.get("keypoints") if num_keypoints is not None else None,
    }
    faults = annotation_faults(used, width, height, num_keypoints, needs_mask=scores_masks)
    return next((text for kind, text in faults if kind not in _SCORABLE), "")
