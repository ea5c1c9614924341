"""Time and memory of a dataset's check, and of an evaluation that takes predictions, by size.

A MB has 10^6 bytes. Only Linux tells the memory of a process.
"""

import json
import tempfile
import time
from pathlib import Path

from benchmark.made_up_detections import made_up_ground_truth, made_up_predictions
from benchmark.stages import register
from benchmark.timing import PeakMemory
from mask_rcnn_plugin.data.check import check_file
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator

# Images and annotations of the checked datasets; the last are about COCO's.
DATASET_SIZES = ((1_000, 10_000), (10_000, 100_000), (100_000, 1_000_000))


def dataset_check(images: int, annotations: int) -> dict[str, float | None]:
    """Check a made-up training set of a model with masks, its images not opened.

    The annotation file was just written, so the system still has it in memory: reading it from a
    disk comes on top. "grown_mb" is the most memory that the check held.

    Raises:
        ValueError: if there are errors, as a training would then not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made_up.json"
        truth = made_up_ground_truth(images, annotations)
        file.write_text(json.dumps(truth))
        for image in truth["images"]:
            (file.parent / image["file_name"]).touch()
        del truth
        start = time.perf_counter()
        with PeakMemory("cpu") as peak:
            checked = check_file(
                str(file), folder, training=True, needs_mask=True, open_images=False
            )
        seconds = time.perf_counter() - start
        if checked.findings.count("error"):
            raise ValueError(f"the made-up dataset has errors:\n{checked.findings.table()}")
        return {
            "images": images,
            "annotations": annotations,
            "file_mb": file.stat().st_size / 1e6,
            "seconds": seconds,
            "grown_mb": _mb(peak),
        }


def evaluation_memory(images: int = 5_000) -> dict[str, float | None]:
    """What the plugin's evaluator keeps of images of 100 detections each until AP is computed.

    The predictions are made up on the way and thrown away. "seconds" are those in `process()`.
    """
    truth = made_up_ground_truth(images, objects=7 * images)
    with tempfile.TemporaryDirectory() as folder:
        dataset = register(Path(folder), truth)
        evaluator = MaskRCNNCOCOEvaluator(dataset, ("bbox", "segm"), distributed=False)
    evaluator.reset()
    seconds = 0.0
    with PeakMemory("cpu") as peak:
        for image, output in made_up_predictions(truth):
            start = time.perf_counter()
            evaluator.process([image], [output])
            seconds += time.perf_counter() - start
    return {"images": images, "seconds": seconds, "grown_mb": _mb(peak)}


def _mb(peak: PeakMemory) -> float | None:
    return peak.mib and peak.mib * 2**20 / 1e6
