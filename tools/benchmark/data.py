"""What comes before the model: images a second of the loader, and the start on a large dataset."""

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json, register_coco_instances
from PIL import Image

from benchmark.made_up_detections import made_up_ground_truth
from benchmark.stages import picture
from benchmark.timing import PeakMemory
from mask_rcnn_plugin.data.annotation_file import keep_decoded
from mask_rcnn_plugin.data.check import check_file
from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.data.garbage import collection_paused
from mask_rcnn_plugin.data.loader import build_train_loader
from mask_rcnn_plugin.data.mapper import MaskRCNNDatasetMapper

COCO = (118_000, 860_000)  # images and annotations to train on
_SIZE = (480, 640)  # height and width of a photo
_BATCH = 2
_TURNS = 5  # a round: a turn takes less than a second


def loader_speed(rounds: int, images: int = 16) -> dict[str, Any]:
    """Images a second of one core: made-up photos with 7 masks each, resized to 800 and flipped.

    The loaders load in this process, without the way from a worker to it. The processor's seconds
    count, of which a busy machine takes less than of the clock's; the order changes each round.
    """
    resize = T.ResizeShortestEdge(800, 1333)
    given: dict[str, Any] = {
        "augmentations": [resize, T.RandomFlip()],
        "image_format": "BGR",
        "use_instance_mask": True,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        truth = made_up_ground_truth(images, 7 * images)
        for number, entry in enumerate(truth["images"]):
            pixels = picture(_SIZE, number).numpy().transpose(1, 2, 0)
            Image.fromarray(pixels).save(Path(folder, entry["file_name"]), quality=90)
        Path(folder, "a.json").write_text(json.dumps(truth))
        records = load_coco_json(f"{folder}/a.json", folder)
        mappers: dict[str, Callable[[Any], Any]] = {
            "detectron2": DatasetMapper(True, **given),
            "plugin": MaskRCNNDatasetMapper(True, **given),
            "plugin, resize=opencv": MaskRCNNDatasetMapper(True, **given, resize="opencv"),
        }
        loaders, seconds = {}, {name: list[float]() for name in mappers}
        for name, mapper in mappers.items():
            build = build_detection_train_loader if name == "detectron2" else build_train_loader
            options: dict[str, Any] = {"total_batch_size": _BATCH, "num_workers": 0}
            loaders[name] = iter(build(records, mapper=mapper, **options))
            next(loaders[name])
        for number in range(_TURNS * rounds):
            for name in sorted(loaders, reverse=number % 2 == 1):
                start = time.process_time()
                list(itertools.islice(loaders[name], images // _BATCH))
                seconds[name].append(time.process_time() - start)
        plain, fast = (
            MaskRCNNDatasetMapper(False, augmentations=[resize], image_format="BGR", resize=which)
            for which in ("pillow", "opencv")
        )
        off = [
            np.abs(fast(r)["image"].numpy().astype(int) - plain(r)["image"].numpy().astype(int))
            for r in records[:4]
        ]
    torch.set_num_threads(threads)
    stock = seconds["detectron2"]
    return {
        "images_per_second": {k: images / median(s) for k, s in seconds.items()},
        "ratio": {k: median(a / b for a, b in zip(stock, s)) for k, s in seconds.items()},
        "pixel_difference": {
            "mean": float(np.mean([d.mean() for d in off])),
            "max": int(max(d.max() for d in off)),
        },
    }


def startup(images: int = COCO[0], annotations: int = COCO[1]) -> dict[str, Any]:
    """Seconds of the processor, and memory, from an annotation file to the first batch.

    The plugin's has the registration and the check at the door besides. Images are there, but not
    read, as the batch is one of records.
    """
    steps: dict[str, dict[str, float]] = {"detectron2": {}, "plugin": {}}
    peaks: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/made_up.json"
        truth = made_up_ground_truth(images, annotations)
        Path(file).write_text(json.dumps(truth))
        for image in truth["images"]:
            Path(folder, image["file_name"]).touch()
        del truth
        options: dict[str, Any] = {"mapper": lambda record: record, "total_batch_size": _BATCH}

        def timed(peer: str, step: str, function: Callable[[], Any]) -> Any:
            start = time.process_time()
            result = function()
            steps[peer][step] = time.process_time() - start
            return result

        def check() -> None:
            check_file(file, folder, training=True, needs_mask=True, open_images=False)

        name = register_coco_dataset(file, folder)
        with PeakMemory("cpu") as peak:
            keep_decoded(True)  # as train.py does
            timed("plugin", "registration", lambda: register_coco_dataset(file, folder))
            timed("plugin", "check", check)
            with collection_paused():
                load = lambda: get_detection_dataset_dicts([name])  # noqa: E731
                records = timed("plugin", "load", load)
                build = lambda: build_train_loader(records, **options)  # noqa: E731
                timed("plugin", "first batch", lambda: next(iter(build())))
            keep_decoded(False)
        peaks["plugin"] = peak.mib
        del records
        register_coco_instances("stock", {}, file, folder)
        with PeakMemory("cpu") as peak:
            records = timed("detectron2", "load", lambda: get_detection_dataset_dicts(["stock"]))
            build = lambda: build_detection_train_loader(records, **options)  # noqa: E731
            timed("detectron2", "first batch", lambda: next(iter(build())))
        peaks["detectron2"] = peak.mib
    DatasetCatalog.remove("stock")
    return {"images": images, "annotations": annotations, "seconds": steps, "peak_mib": peaks}
