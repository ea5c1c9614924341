"""COCO's AP of many predictions, on the fastest backend that is installed and in little memory.

COCO's API wants a dict for each prediction, which for 5,000 images of 100 takes gigabytes. Here
they are packed image by image while a model runs, unpacked into columns to be scored, and become
dicts a few categories at a time. COCO scores each category apart, so the numbers are the same.
"""

import contextlib
import gc
import io
import json
import pickle
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import detectron2
import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval, COCOeval_opt, COCOevalMaxDets
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

# What is scored at one time, in predictions and (image, category) pairs: a backend keeps a record
# of each pair too. A category that is larger makes a group alone.
GROUP_SIZE = 100_000

# In place of a mask that nothing is compared to: one pixel, not of the object.
_NO_MASK = {"size": [1, 1], "counts": "1"}


class Backend(NamedTuple):
    """An implementation of COCO's API.

    Attributes:
        name: name and version, and why it is not a faster one, if that is the ground truth's doing.
        coco: its `COCO`.
        coco_eval: its `COCOeval`.
    """

    name: str
    coco: Callable[[], Any]
    coco_eval: Callable[[Any, Any, str], Any]


def find_backend(ground_truth: dict[str, Any], official: bool = False) -> Backend:
    """The fastest installed backend for a data set; all of them give the same numbers.

    Args:
        ground_truth: content of a COCO annotation file.
        official: pycocotools, COCO's own implementation, whatever else is installed.

    Returns:
        detectron2's compiled `COCOeval_opt`, else faster-coco-eval (1.8 or newer), else
        pycocotools; the latter also for annotations that faster-coco-eval reads otherwise.
    """
    pycocotools = Backend(f"pycocotools {version('pycocotools')}", COCO, COCOeval)
    if official:
        return pycocotools
    if COCOeval_opt is not COCOeval:  # the same where detectron2 lacks its extension
        return Backend(f"detectron2 {detectron2.__version__} COCOeval_opt", COCO, COCOeval_opt)
    try:
        import faster_coco_eval as faster
    except ImportError:
        return pycocotools
    name = f"faster-coco-eval {faster.__version__}"
    if tuple(int(n) for n in faster.__version__.split(".")[:2]) < (1, 8):
        return pycocotools._replace(name=f"{pycocotools.name} ({name} is older than 1.8)")
    oddity = _oddity(ground_truth)
    if oddity:
        return pycocotools._replace(name=f"{pycocotools.name} (not {name}: {oddity})")
    return Backend(name, faster.COCO, faster.COCOeval_faster)


def _oddity(ground_truth: dict[str, Any]) -> str:
    """What pycocotools refuses or reads otherwise than faster-coco-eval, which converts ids to
    unsigned integers, takes a missing area for zero and any polygon for a mask; "" if nothing."""
    ids = [("image", image["id"]) for image in ground_truth["images"]]
    for a in ground_truth.get("annotations", []):
        ids += [(key, a[f"{key}_id"]) for key in ("image", "category")] + [("annotation", a["id"])]
    for key, value in ids:
        if type(value) is not int or not 0 <= value < 2**63:
            return f"{key} id {value!r} is not an integer of 0 or more"
    for a in ground_truth.get("annotations", []):
        for key in ("area", "iscrowd"):
            if not isinstance(a.get(key), (int, float)):
                return f"annotation {a['id']} has {key} {a.get(key)!r}, which is no number"
        mask = a.get("segmentation")
        if isinstance(mask, list) and (not mask or any(len(part) < 6 for part in mask)):
            return f"annotation {a['id']} has a polygon of fewer than 3 points"
    return ""


def pack(results: list[dict[str, Any]]) -> bytes:
    """An image's predictions in COCO's format as one short string; see `unpack`.

    Not as JSON: most of that would be the digits of floats, which are slow to read.
    """
    return zlib.compress(pickle.dumps(results, pickle.HIGHEST_PROTOCOL), level=1)


def unpack(packed: bytes) -> list[dict[str, Any]]:
    """What `pack` was given."""
    return pickle.loads(zlib.decompress(packed))


def write_predictions(path: Path, packed: Iterable[bytes]) -> None:
    """Write all images' predictions as one JSON list, as `json.dumps` would, an image at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps(unpack(image))[1:-1] for image in packed)  # without the brackets
    with path.open("w") as file:
        file.write("[")
        for i, text in enumerate(filter(None, texts)):
            file.write(f", {text}" if i else text)
        file.write("]")


class Detections:
    """The predictions of all images in columns, a tenth of the size of dicts.

    Args:
        packed: of each image, from `pack`; category ids are the data set's.
        tasks: of "bbox", "segm", "keypoints": what they do not need is left out.
        ground_truth: content of a COCO annotation file.

    Raises:
        ValueError: for a prediction of an image that the ground truth does not have.
    """

    def __init__(
        self, packed: Iterable[bytes], tasks: Iterable[str], ground_truth: dict[str, Any]
    ) -> None:
        tasks = set(tasks)
        images = {image["id"] for image in ground_truth["images"]}
        self._images = len(images)
        # (image, category) with ground truth: only there is a mask compared to another.
        met = {(a["image_id"], a["category_id"]) for a in ground_truth["annotations"]}
        self._image_ids: list[Any] = []
        self._scores = array("d")
        self._boxes = array("d")
        self._masks: list[tuple[list[int], str] | None] = []
        self._mask_areas = array("d")
        self._keypoints: list[array[float]] = []
        self._rows: dict[Any, array[int]] = {}  # of each category
        sizes: dict[tuple[int, ...], list[int]] = {}  # one list for all masks of a size
        for image in packed:
            predictions = unpack(image)
            for row, p in enumerate(predictions, start=len(self)):
                self._rows.setdefault(p["category_id"], array("q")).append(row)
            if predictions and predictions[0]["image_id"] not in images:
                raise ValueError(
                    f"there are predictions of image {predictions[0]['image_id']!r}, but it is not "
                    f"among the {len(images)} images of the ground truth"
                )
            self._image_ids.extend(p["image_id"] for p in predictions)
            self._scores.extend(p["score"] for p in predictions)
            if tasks & {"bbox", "keypoints"}:
                for p in predictions:
                    self._boxes.extend(p["bbox"])
            if "segm" in tasks:
                masks = [p["segmentation"] for p in predictions]
                self._mask_areas.extend(coco_mask.area(masks))
                for p, mask in zip(predictions, masks):
                    size = sizes.setdefault(tuple(mask["size"]), mask["size"])
                    seen = (p["image_id"], p["category_id"]) in met
                    self._masks.append((size, mask["counts"]) if seen else None)
            if "keypoints" in tasks:
                self._keypoints.extend(array("d", p["keypoints"]) for p in predictions)

    def __len__(self) -> int:
        return len(self._scores)

    def groups(self, category_ids: Iterable[Any]) -> Iterator[list[Any]]:
        """Neighbouring categories that come to `GROUP_SIZE` or less together."""
        group: list[Any] = []
        size = 0
        for category in category_ids:
            n = len(self._rows.get(category, ())) + self._images
            if group and size + n > GROUP_SIZE:
                yield group
                group, size = [], 0
            group.append(category)
            size += n
        yield group

    def annotations(self, task: str, category_ids: Iterable[Any]) -> list[dict[str, Any]]:
        """The predictions of some categories as COCO's `loadRes` makes them, as far as the task
        needs it: the area is the mask's where masks are scored, else the box's."""
        annotations = []
        for category in category_ids:
            for row in self._rows.get(category, ()):
                annotation = {
                    "id": row + 1,
                    "image_id": self._image_ids[row],
                    "category_id": category,
                    "score": self._scores[row],
                    "iscrowd": 0,
                }
                if task == "segm":
                    mask = self._masks[row]
                    annotation["segmentation"] = (
                        {"size": mask[0], "counts": mask[1]} if mask else _NO_MASK
                    )
                    annotation["area"] = self._mask_areas[row]
                else:
                    box = self._boxes[4 * row : 4 * row + 4].tolist()
                    annotation["bbox"] = box
                    annotation["area"] = box[2] * box[3]
                if task == "keypoints":
                    annotation["keypoints"] = self._keypoints[row].tolist()
                annotations.append(annotation)
        return annotations


def evaluate_task(
    backend: Backend,
    ground_truth: dict[str, Any],
    detections: Detections,
    task: str,
    max_dets: list[int],
    oks_sigmas: list[float] | None = None,
    image_ids: list[Any] | None = None,
) -> SimpleNamespace:
    """Score one task. Prints COCO's twelve numbers (ten for keypoints).

    Args:
        backend: from `find_backend`.
        ground_truth: content of a COCO annotation file.
        detections: at least one.
        task: "bbox", "segm" or "keypoints".
        max_dets: three limits on the detections of an image and category, for "bbox" and "segm".
        oks_sigmas: one for each type of keypoint; needed for "keypoints".
        image_ids: score these images only.

    Returns:
        Of a `COCOeval` the attributes `params`, `eval["precision"]`, `eval["recall"]` and `stats`
        (0 to 1; -1: nothing to score); categories lie in the order of their ids.
    """
    truth = _indexed(backend, ground_truth, ground_truth["annotations"])

    def evaluated(categories: list[Any]) -> tuple[Any, dict[str, Any]]:
        predicted = _indexed(backend, ground_truth, detections.annotations(task, categories))
        coco_eval = backend.coco_eval(truth, predicted, task)
        coco_eval.params.catIds = categories
        if image_ids is not None:
            coco_eval.params.imgIds = image_ids
        if task == "keypoints":
            coco_eval.params.kpt_oks_sigmas = np.array(oks_sigmas)
        else:
            coco_eval.params.maxDets = max_dets
        with contextlib.redirect_stdout(io.StringIO()):
            coco_eval.evaluate()
            coco_eval.accumulate()
        # Not `coco_eval`, which holds a group's predictions that must go before the next group's.
        return coco_eval.params, {key: coco_eval.eval[key] for key in ("precision", "recall")}

    groups = [evaluated(categories) for categories in detections.groups(sorted(truth.cats))]
    summary = SimpleNamespace(
        params=groups[0][0],
        eval={
            "precision": np.concatenate([group["precision"] for _, group in groups], axis=2),
            "recall": np.concatenate([group["recall"] for _, group in groups], axis=1),
        },
    )
    # pycocotools' own summary knows no limit but 100 detections; there this one equals it.
    COCOevalMaxDets.summarize(summary)
    return summary


def _indexed(
    backend: Backend, ground_truth: dict[str, Any], annotations: list[dict[str, Any]]
) -> Any:
    """The backend's `COCO` of annotations, with the ground truth's images and categories."""
    coco = backend.coco()
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No search for garbage inside the block: COCO's API makes hundreds of thousands of dicts, none
    in a cycle, and walking through them again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
