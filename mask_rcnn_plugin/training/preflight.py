"""The datasets of a config, checked before anything is trained on them."""

import logging
import shlex
from collections import Counter
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.data.check import Checked, Findings, check_file, compare
from mask_rcnn_plugin.data.coco import DatasetError

_logger = logging.getLogger(__name__)


def check_sets(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    *,
    open_images: bool = True,
) -> tuple[list[Checked], Findings]:
    """Check training and test set of a config, each by itself and with each other and the model.

    Args:
        cfg: from `get_config`; its datasets need not be set up.
        overrides: with which it was made: a num_classes given there must be the dataset's.
        open_images: whether to open and decode each image.

    Returns:
        What was found in each file, the test set last, and in their comparison.

    Raises:
        DatasetError: if a dataset's name is not registered, or there is not one test set.
    """
    train, test = (dataset_files(cfg.dataset[split]) for split in ("train", "test"))
    if len(test) != 1 or not train:
        raise DatasetError(f"training sets are {train}, test sets {test}: give some and one")
    # A user's mapper may be a function, or have no such argument.
    needs_mask = bool(OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask"))

    def check(files: tuple[str, str], training: bool) -> Checked:
        return check_file(
            *files,
            training=training,
            needs_mask=needs_mask,
            open_images=open_images,
        )

    checked = [check(files, training=True) for files in train] + [check(test[0], training=False)]
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
    """Annotation file and image folder of each dataset of a config's `dataset.train` or `.test`.

    Raises:
        DatasetError: if a name is not registered with a COCO-format file.
    """
    if split.json:
        return [(split.json, split.images)]
    try:
        found = [MetadataCatalog.get(name) for name in split.names]
        return [(metadata.json_file, metadata.image_root) for metadata in found]
    except AttributeError as error:
        raise DatasetError(
            f"of {list(split.names)} not all are registered with a COCO-format file"
        ) from error


def check_datasets(cfg: DictConfig, config: str, overrides: Sequence[str] = ()) -> None:
    """`check_sets` for a training, without opening images; every process calls this.

    Opening images takes minutes at each start; what is wrong with one turns up when it is read. One
    process checks, the others learn the outcome.

    Args:
        cfg: from `get_config`.
        config: its name on the command line, for the message.
        overrides: with which it was made.

    Raises:
        DatasetError: in every process, if there is an error.
    """
    errors = ""
    if comm.is_main_process():
        checked, together = check_sets(cfg, overrides, open_images=False)
        found = [*(c.findings for c in checked), together]
        arguments = ["--config-file", config, *overrides]
        command = shlex.join(["python", "tools/check_dataset.py", *arguments])
        errors = _summary(found, "error", command)
        warnings = _summary(found, "warning", command)
        if warnings and not errors:
            _logger.warning(warnings)
    errors = comm.all_gather(errors)[0]
    if errors:
        raise DatasetError(
            f"{errors}, and with --json FILE --images DIR --fix OUT.json writes a copy without; "
            "--no-check trains all the same"
        )


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
