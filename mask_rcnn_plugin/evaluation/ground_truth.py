"""What must hold of annotations before predictions are compared to them."""

from collections.abc import Iterable
from typing import Any

from pycocotools.coco import COCO

from mask_rcnn_plugin.data.annotation_rules import (
    annotation_faults,
    are_finite,
    are_numbers,
    is_integer,
    shown,
)
from mask_rcnn_plugin.data.coco import DatasetError

# Of `annotation_faults`: nothing will match such an object, but COCO's numbers are defined.
_SCORABLE = {"box-negative", "box-empty", "box-outside", "mask-empty"}


def check_ground_truth(
    name: str, coco: COCO, tasks: Iterable[str], num_keypoints: int | None = None
) -> None:
    """Refuse what COCO's implementations fail on, loop on for ever or read as something else.

    Nothing is left out instead: AP would be of another data set.

    Args:
        name: of the dataset, for the message.
        coco: its annotations; those of images that it does not have are not looked at, or scored.
        tasks: of "bbox", "segm", "keypoints"; a mask is needed and looked at for "segm" alone.
        num_keypoints: that each list of keypoints must have; None where they are not scored.

    Raises:
        DatasetError: with the number of such annotations and the first of them.
    """
    wrong = []
    for annotation in coco.dataset.get("annotations", []):
        image = coco.imgs.get(annotation["image_id"])
        if image is not None:
            reason = _reason(annotation, image, "segm" in tasks, num_keypoints)
            if reason:
                wrong.append(f"id {shown(annotation['id'])}: {reason}")
    if wrong:
        raise DatasetError(
            f"{len(wrong)} annotations of the test set {name!r} cannot be scored, e.g. {wrong[0]}; "
            "`python tools/check_dataset.py --json ... --images ... --fix OUT.json` writes a copy "
            "without them"
        )


def _reason(
    annotation: dict[str, Any], image: dict[str, Any], with_mask: bool, num_keypoints: int | None
) -> str:
    if not is_integer(annotation["id"]) or abs(annotation["id"]) > 2**63:
        return "id must be an integer of at most 64 bits"
    if annotation["iscrowd"] not in (0, 1):
        return f"iscrowd is {shown(annotation['iscrowd'])}, must be 0 or 1"
    area = annotation.get("area")
    if not (are_numbers([area]) and are_finite([area])):
        return f"area is {shown(area)}, must be a number"
    unused = set() if with_mask else {"segmentation"}
    if num_keypoints is None:
        unused.add("keypoints")
    used = {key: value for key, value in annotation.items() if key not in unused}
    faults = annotation_faults(
        used, image["width"], image["height"], num_keypoints, needs_mask=with_mask
    )
    return next((text for kind, text in faults if kind not in _SCORABLE), "")
