"""Time and memory of the check of a data set, with images not opened, on made-up files.

The annotation file was just written, so the system still has it in memory. Reading it from a disk
comes on top:

    measured = dataset_check(images=1_000, annotations=10_000)
"""

import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmark.made_up_detections import made_up_ground_truth
from benchmark.timing import high_water_mib
from mask_rcnn_plugin.data.check import check_file

# Images and annotations; the last are about COCO's.
DATASET_SIZES = ((1_000, 10_000), (10_000, 100_000), (100_000, 1_000_000))


class DatasetCheck(NamedTuple):
    """
    Attributes:
        images, annotations: how many the check has read.
        file_mb: size of the annotation file, in MB (10^6 bytes).
        seconds: that the check took.
        peak_mb: the most memory resident in the process until the check was done, in MB.
        imports_mb: the same before the check, when all was imported, in MB.
    """

    images: int
    annotations: int
    file_mb: float
    seconds: float
    peak_mb: float
    imports_mb: float


def dataset_check(images: int, annotations: int) -> DatasetCheck:
    """Check a made-up data set in a process of its own, as `timed_check` does.

    Args:
        images: number of images.
        annotations: number of annotations in all of them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_made_up(folder, images, annotations)
        # Spawned, as a forked one starts with this one's memory.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(timed_check, folder).result()


def write_made_up(folder: Path, images: int, annotations: int) -> None:
    """Write made_up.json, from `made_up_ground_truth`, and the folder images/ of empty files."""
    truth = made_up_ground_truth(images, annotations)
    (folder / "made_up.json").write_text(json.dumps(truth))
    (folder / "images").mkdir()
    for image in truth["images"]:
        (folder / "images" / image["file_name"]).touch()


def timed_check(folder: Path) -> DatasetCheck:
    """Check what `write_made_up` wrote as a training set of a model with masks.

    Linux alone tells the memory, and counts it from the start of the process.

    Raises:
        ValueError: if there are errors, as a training would then not start.
    """
    file = folder / "made_up.json"
    imports_mib = high_water_mib()
    start = time.perf_counter()
    checked = check_file(
        str(file),
        str(folder / "images"),
        training=True,
        needs_mask=True,
        open_images=False,
        progress=True,
    )
    seconds = time.perf_counter() - start
    peak_mib = high_water_mib()
    if checked.file is None or checked.findings.count("error"):
        raise ValueError(f"the made-up data set has errors:\n{checked.findings.table()}")
    return DatasetCheck(
        images=len(checked.file.images),
        annotations=len(checked.file.annotations),
        file_mb=file.stat().st_size / 1e6,
        seconds=seconds,
        peak_mb=peak_mib * 2**20 / 1e6,
        imports_mb=imports_mib * 2**20 / 1e6,
    )
