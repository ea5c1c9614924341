"""Predictions in COCO's results format: kept small in memory, on disk, and for COCO's server."""

import io
import json
import math
import mmap
import pickle
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypedDict

import msgspec
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.fast.mask_rle import RLEMasks

PredictionsOf = defaultdict[Any, list[dict[str, Any]]]  # of an image by its id

PREDICTIONS_FILE = "coco_instances_results.json"

# What COCO's server calls a task, and the field of a prediction that it scores. A mask is sent
# without its box, whose area would else stand for the mask's where AP tells small from large.
_SUBMISSIONS = {
    "bbox": ("detections", "bbox"),
    "segm": ("detections", "segmentation"),
    "keypoints": ("person_keypoints", "keypoints"),
}


def coco_results(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """One image's predictions in COCO's format, but with the model's classes as categories.

    As detectron2's `instances_to_coco_json`, except that masks encoded already are passed on, and
    the keypoints of `instances` stay where they are.

    Args:
        instances: on the CPU; fields pred_boxes, scores, pred_classes and, if predicted, pred_masks
            and pred_keypoints.
    """
    fields = dict(instances.get_fields())
    if "pred_keypoints" in fields:  # which detectron2 moves in place
        fields["pred_keypoints"] = fields["pred_keypoints"].clone()
    rles = fields.pop("pred_masks").rles if isinstance(fields.get("pred_masks"), RLEMasks) else ()
    results = instances_to_coco_json(Instances(instances.image_size, **fields), image_id)
    for result, rle in zip(results, rles):
        result["segmentation"] = rle
    return results


def pack(results: list[dict[str, Any]]) -> bytes:
    """Predictions as one short string, about 12 kB for a hundred masks; see `unpack`.

    Not as JSON: most of that would be the digits of floats, which are slow to read.
    """
    return zlib.compress(pickle.dumps(results, pickle.HIGHEST_PROTOCOL), level=1)


def unpack(packed: bytes) -> list[dict[str, Any]]:
    """What `pack` was given."""
    return pickle.loads(zlib.decompress(packed))


def write_predictions(path: Path, images: Iterable[bytes]) -> None:
    """Write all images' predictions as one JSON list, as `json.dumps` would, an image at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        write_json(file, map(unpack, images))


def write_json(file: TextIO, images: Iterable[list[dict[str, Any]]]) -> None:
    """Write the predictions of images, as they come, as one JSON list."""
    texts = (json.dumps(image)[1:-1] for image in images if image)  # without the brackets
    file.write("[")
    try:
        for i, text in enumerate(texts):
            file.write(f", {text}" if i else text)
    finally:  # what is there can be read, whatever ends it
        file.write("]")


class _RLE(TypedDict):
    size: list[int]
    counts: str


class _Scored(TypedDict):
    image_id: int | float | str
    category_id: int | float
    score: float


class _Prediction(_Scored, total=False):
    file_name: str
    bbox: list[float]
    segmentation: _RLE
    keypoints: list[float]


def read_predictions(
    path: Path, least_score: float = -math.inf, files: Mapping[str, Any] | None = None
) -> PredictionsOf:
    """{image id: predictions of at least that score}, of a file; see `iterate_predictions`."""
    images: PredictionsOf = defaultdict(list)
    for prediction in iterate_predictions(path, files):
        if prediction["score"] >= least_score:
            images[prediction["image_id"]].append(prediction)
    return images


def iterate_predictions(
    path: Path, files: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """The predictions of a file in COCO's results format, read one at a time.

    Args:
        files: {file of an image: its id} of the dataset. A prediction that has a "file_name", as
            those of tools/predict.py, belongs to the one file whose path ends with it.

    Raises:
        DatasetError: if it is no such file.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ids = None
        decode = msgspec.json.Decoder(_Prediction).decode
        for raw in msgspec.json.decode(content, type=list[msgspec.Raw]):
            prediction: dict[str, Any] = {**decode(raw)}
            if "file_name" in prediction:
                ids = _by_ending(files or {}) if ids is None else ids
                name = prediction.pop("file_name")
                prediction["image_id"] = ids.get(name, name)
            yield prediction
    except (OSError, ValueError, msgspec.DecodeError) as error:  # an empty file is a ValueError
        raise DatasetError(f"predictions file {str(path)!r} cannot be read: {error}") from error


def _by_ending(files: Mapping[str, Any]) -> dict[str, Any]:
    """Ids by all endings of the paths that no two of them share."""
    ids: defaultdict[str, set[Any]] = defaultdict(set)
    for file, id_ in files.items():
        parts = Path(file).parts
        for i in range(len(parts)):
            ids["/".join(parts[i:])].add(id_)
    return {ending: of.pop() for ending, of in ids.items() if len(of) == 1}


def write_submissions(
    folder: Path, images: Sequence[bytes], testset: str, tasks: Iterable[str]
) -> list[Path]:
    """Write what COCO's evaluation server takes for a test set that it alone can score.

    Args:
        images: packed predictions.
        testset: the server's name of the set, e.g. "test-dev2017".
        tasks: of "bbox", "segm", "keypoints".

    Returns:
        For each task FOLDER/TASK/TYPE_TESTSET_mask-rcnn_results.zip, with a JSON file of the same
        name; TYPE is "detections" or "person_keypoints". Coordinates are rounded to a tenth of a
        pixel, as COCO asks.
    """
    files = []
    for task in tasks:
        kind, field = _SUBMISSIONS[task]
        name = f"{kind}_{testset}_mask-rcnn_results"
        file = folder / task / f"{name}.zip"
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            io.TextIOWrapper(archive.open(f"{name}.json", "w")) as text,
        ):
            write_json(text, (_submitted(unpack(image), field) for image in images))
        files.append(file)
    return files


def _submitted(predictions: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    return [
        {
            "image_id": p["image_id"],
            "category_id": p["category_id"],
            field: p[field] if field == "segmentation" else [round(x, 1) for x in p[field]],
            "score": p["score"],
        }
        for p in predictions
    ]
