"""The data sets of a config, checked before anything is trained on them."""

import logging
import shlex
from collections import Counter
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.data.check import Checked, Findings, check_file, compare
from mask_rcnn_plugin.data.coco import DatasetError, register_keypoint_test_dev

_logger = logging.getLogger(__name__)


def check_sets(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    *,
    open_images: bool = True,
    progress: bool = True,
) -> tuple[list[Checked], Findings]:
    """Check training and test set of a config, each by itself and with each other and the model.

    Args:
        cfg: from `get_config`; its data sets need not be set up.
        overrides: with which it was made: a num_classes given there must be the data set's.
        open_images: whether to open and decode each image.
        progress: whether to show progress bars on standard error.

    Returns:
        What was found in each file, the test set last, and in their comparison.

    Raises:
        DatasetError: if a data set's name is not registered, or there is not one test set.
    """
    train, test = (dataset_files(cfg.dataset[split]) for split in ("train", "test"))
    if len(test) != 1 or not train:
        raise DatasetError(
            f"there must be training sets, there are {train}, and one test set, {test}"
        )
    # A user's mapper may be a function, or have no such argument.
    needs_mask = bool(OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask"))
    checked = [
        check_file(
            json_file,
            image_root,
            training=training,
            needs_mask=needs_mask,
            open_images=open_images,
            progress=progress,
        )
        for files, training in ((train, True), (test, False))
        for json_file, image_root in files
    ]
    key = "model.roi_heads.num_classes="
    given = [o.rpartition("=")[2] for o in overrides if o.removeprefix("+").startswith(key)]
    together = compare(
        checked[:-1],
        checked[-1],
        num_classes=int(given[-1]) if given and given[-1].isdecimal() else None,
        needs_keypoints=OmegaConf.select(cfg.model.roi_heads, "keypoint_head") is not None,
        open_images=open_images,
    )
    return checked, together


def dataset_files(split: DictConfig) -> list[tuple[str, str]]:
    """Annotation file and image folder of each data set of a config's `dataset.train` or `.test`.

    Raises:
        DatasetError: if a name is not registered with a COCO-format file.
    """
    if split.json:
        return [(split.json, split.images)]
    register_keypoint_test_dev()
    try:
        found = [MetadataCatalog.get(name) for name in split.names]
        return [(metadata.json_file, metadata.image_root) for metadata in found]
    except AttributeError as error:
        raise DatasetError(
            f"of {list(split.names)} not all are registered with a COCO-format file"
        ) from error


def check_datasets(cfg: DictConfig, config: str, overrides: Sequence[str] = ()) -> None:
    """`check_sets` for a training, without opening images; every process calls this.

    Images are not opened as that takes minutes of each start; what is wrong with one turns up when
    it is read. One process checks, the others learn what came of it.

    Args:
        cfg: from `get_config`.
        config: its name on the command line, for the message.
        overrides: with which it was made.

    Raises:
        DatasetError: in every process, if there is an error.
    """
    message = _summary(cfg, config, overrides) if comm.is_main_process() else ""
    message = comm.all_gather(message)[0]
    if message:
        raise DatasetError(message)


def _summary(cfg: DictConfig, config: str, overrides: Sequence[str]) -> str:
    """The errors in a line, "" if there is none; warnings are logged."""
    checked, together = check_sets(cfg, overrides, open_images=False)
    counts: dict[str, Counter[str]] = {"error": Counter(), "warning": Counter()}
    for findings in (*(c.findings for c in checked), together):
        for kind, finding in findings.items():
            if finding.severity in counts:
                counts[finding.severity][kind] += finding.count
    command = shlex.join(["python", "tools/check_dataset.py", "--config-file", config, *overrides])
    errors, warnings = (
        f"{found.total()} {severity}{'s' if found.total() > 1 else ''} in the data sets ("
        + ", ".join(f"{kind} {count}" for kind, count in found.most_common(5))
        + (", ..." if len(found) > 5 else "")
        + f"): {command} shows {'them' if found.total() > 1 else 'it'}"
        for severity, found in counts.items()
    )
    if counts["error"]:
        return (
            f"{errors}, and with --json FILE --images DIR --fix OUT.json writes a copy without; "
            "--no-check trains all the same"
        )
    if counts["warning"]:
        _logger.warning(warnings)
    return ""
