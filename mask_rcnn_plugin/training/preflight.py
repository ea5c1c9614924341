"""The datasets of a config, checked before anything is trained on them."""

import logging
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.data.check import Checked, Findings, check_file, compare
from mask_rcnn_plugin.data.coco import DatasetError, has_coco_file
from mask_rcnn_plugin.evaluation.evaluator import in_coco_format
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.training.setup import check_exists

logger = logging.getLogger(__name__)


def check_sets(
    cfg: DictConfig, overrides: Sequence[str] = (), *, open_images: bool = True
) -> tuple[list[Checked], Findings]:
    """Check training and test set of a config, each by itself and with each other and the model.

    Args:
        cfg: from `get_config`; its datasets need not be set up.
        overrides: with which it was made: a num_classes given there must be the dataset's.
        open_images: whether to open and decode each image.

    Returns:
        What was found in each dataset, test sets last, and in their comparison.

    Raises:
        DatasetError: if a dataset's name is not registered, or its loader fails.
    """
    # A user's mapper may be a function, or have no such argument.
    needs_mask = bool(OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask"))

    options = {"needs_mask": needs_mask, "open_images": open_images}
    train, test = (
        [check_file(split.json, split.images, training=training, **options)]
        if split.json
        else [_check_registered(name, training=training, **options) for name in split.names]
        for split, training in ((cfg.dataset.train, True), (cfg.dataset.test, False))
    )
    checked = [*train, *test]
    if not train or not test:  # of which `setup_datasets` tells
        return checked, Findings()
    key = "model.roi_heads.num_classes="
    given = [o.rpartition("=")[2] for o in overrides if o.removeprefix("+").startswith(key)]
    limiting = ("dataset.test.max_detections", "model.proposal_generator.post_nms_topk.1")
    together = compare(
        train,
        test[0],
        num_classes=int(given[-1]) if given and given[-1].isdecimal() else None,
        limits={key: limit for key in limiting if (limit := OmegaConf.select(cfg, key))},
        needs_keypoints=OmegaConf.select(cfg.model.roi_heads, "keypoint_head") is not None,
        open_images=open_images,
    )
    return checked, together


def _check_registered(name: str, **options: Any) -> Checked:
    """`check_file` of a dataset in detectron2's catalogs, or the same of what its loader gives."""
    check_exists(name)
    if has_coco_file(name):
        known = MetadataCatalog.get(name)
        return check_file(known.json_file, known.image_root, **options)
    checked = Checked(name)
    try:
        with in_coco_format(name, numbered=True) as converted:
            checked = check_file(MetadataCatalog.get(converted).json_file, "", **options)
            checked.json_file = name
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of the conversion
        if isinstance(error, DatasetError):
            raise
        checked.findings.add("not-checked", text=f"{type(error).__name__}: {error}")
    return checked


def check_datasets(cfg: DictConfig, config: str, overrides: Sequence[str] = ()) -> None:
    """`check_sets` for a training, without opening images; every process calls this.

    Args:
        config: its name on the command line, for the message.
        overrides: with which it was made.

    Raises:
        DatasetError: in every process, if there is an error.
    """

    def check() -> None:
        checked, together = check_sets(cfg, overrides, open_images=False)
        found = [*(c.findings for c in checked), together]
        arguments = ["--config-file", config, *overrides]
        command = shlex.join(["python", "tools/check_dataset.py", *arguments])
        if errors := _summary(found, "error", command):
            raise DatasetError(
                f"{errors}, and with --json FILE --images DIR --fix OUT.json writes a repaired "
                "copy; --no-check trains anyway"
            )
        if warnings := _summary(found, "warning", command):
            logger.warning(warnings)
        if limited := together.get("detections-limited"):  # what else lowers AP in silence
            logger.warning(limited.example)

    on_main_process(check)


def _summary(found: Sequence[Findings], severity: str, command: str) -> str:
    """All findings of a severity in one line; "" if there is none."""
    counts = Counter[str]()
    for findings in found:
        counts += {k: f.count for k, f in findings.items() if f.severity == severity}
    if not counts:
        return ""
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common(5))
    more = ", ..." if len(counts) > 5 else ""
    return (
        f"datasets have {severity}s ({kinds}{more}), {counts.total()} in all: {command} lists them"
    )
