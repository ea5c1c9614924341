"""COCO evaluation of the plugin's predictions."""

import copy
import itertools
import json
import math
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import detectron2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate

from mask_rcnn_plugin.data.coco import COCO_KEYPOINT_OKS_SIGMAS
from mask_rcnn_plugin.evaluation.average_precision import (
    Detections,
    evaluate_task,
    find_backend,
    pack,
    paused_gc,
    write_predictions,
)
from mask_rcnn_plugin.evaluation.ground_truth import check_ground_truth
from mask_rcnn_plugin.fast.mask_rle import RLEMasks

PREDICTIONS_FILE = "coco_instances_results.json"
Task = Literal["bbox", "segm", "keypoints", "box_proposals"]
_COCO_LIMIT = 100  # detections of an image and category


class MaskRCNNCOCOEvaluator(COCOEvaluator):
    """detectron2's `COCOEvaluator`, which also takes

    * masks that are encoded already: they are passed on, not decoded and encoded again;
    * data in which some categories have keypoints and others do not. Instances without keypoints
      count as unlabelled, so keypoint AP is that of the categories that have them;
    * OKS sigmas from the dataset's metadata (`keypoint_oks_sigmas`);
    * annotations that do not say whether they are crowds: they are none;
    * data sets that are not COCO files, as they are now. detectron2 keeps such a one in a file in
      `output_dir`, from which it is scored for ever after, whatever has changed since.

    What it keeps of an image is one compressed string, about 12 kB for a hundred masks. Numbers
    come from the fastest implementation of COCO's API that is installed (`find_backend`), named by
    `backend`; they are the same on each.

    Args:
        dataset_name: a name in detectron2's catalogs.
        tasks: of "bbox", "segm", "keypoints"; or "box_proposals" alone, the average recall (AR) of
            an RPN's boxes.
        output_dir: where `coco_instances_results.json`, the predictions in COCO's format, is
            written; none if None.
        max_detections: what counts of an image and category, highest scores first, in the AP of
            boxes and masks. COCO's limit is 100, which stays for fewer: AP is then the same. COCO
            scores 20 keypoint detections an image, whatever is given here.
        official: pycocotools, COCO's own implementation, whatever else is installed.
        **kwargs: detectron2's; `use_fast_impl=False` means `official=True`.

    Raises:
        ValueError: for an unknown task; for the keypoint task on a dataset without keypoints or
            sigmas, or with another number of sigmas than of keypoints.
        DatasetError: for annotations that cannot be scored, see `check_ground_truth`.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[Task, ...],
        output_dir: str | None = None,
        *,
        max_detections: int = _COCO_LIMIT,
        official: bool = False,
        **kwargs: Any,
    ) -> None:
        if not set(tasks) <= set(get_args(Task)):
            raise ValueError(f"tasks are {list(tasks)}, must be of {get_args(Task)}")
        metadata = MetadataCatalog.get(dataset_name)
        if "keypoints" in tasks:
            names = metadata.get("keypoint_names")
            if not names:
                raise ValueError(f"dataset {dataset_name!r} has no keypoints to evaluate")
            sigmas = kwargs.get("kpt_oks_sigmas") or keypoint_oks_sigmas(dataset_name)
            if len(sigmas) != len(names):
                raise ValueError(
                    f"kpt_oks_sigmas has {len(sigmas)} values, but dataset {dataset_name!r} has "
                    f"{len(names)} keypoints: give one for each"
                )
            kwargs["kpt_oks_sigmas"] = sigmas
        kwargs.setdefault("max_dets_per_image", max(_COCO_LIMIT, max_detections))
        official = official or not kwargs.pop("use_fast_impl", True)
        with _in_coco_format(dataset_name) as name:
            super().__init__(
                name, tuple(tasks), output_dir=output_dir, use_fast_impl=False, **kwargs
            )
        for annotation in self._coco_api.anns.values():
            annotation.setdefault("iscrowd", 0)
        num_keypoints = len(names) if "keypoints" in tasks else None
        check_ground_truth(dataset_name, self._coco_api, tasks, num_keypoints)
        self._backend = find_backend(self._coco_api.dataset, official)
        if "keypoints" in tasks:
            for annotation in self._coco_api.anns.values():
                if annotation["image_id"] not in self._coco_api.imgs:
                    continue  # not scored, nor checked above
                keypoints = annotation.get("keypoints") or [0] * 3 * len(names)
                # An integer of more than 64 bits would make objects of NumPy's numbers.
                annotation["keypoints"] = [float(value) for value in keypoints]
                annotation.setdefault("num_keypoints", sum(v > 0 for v in keypoints[2::3]))

    @property
    def backend(self) -> str:
        """Who computes the numbers: name and version."""
        if "box_proposals" in self._tasks:
            return f"detectron2 {detectron2.__version__} box proposal recall"
        return self._backend.name

    @property
    def max_detections(self) -> int:
        """How many detections of an image and category count in AP."""
        return self._max_dets_per_image[-1]

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the predictions of some images, packed in COCO's format; proposals as they are.

        Raises:
            ValueError: for a predicted class that the dataset does not have.
        """
        for image, output in zip(inputs, outputs):
            kept: dict[str, Any] = {"image_id": image["image_id"]}
            if "proposals" in output:
                kept["proposals"] = output["proposals"].to(self._cpu_device)
            else:
                instances = output["instances"].to(self._cpu_device)
                results = coco_results(instances, image["image_id"])
                self._use_dataset_ids(results)
                kept["instances"] = pack(results)
            self._predictions.append(kept)

    def _use_dataset_ids(self, results: list[dict[str, Any]]) -> None:
        """Replace the model's classes, 0 to K - 1, by the dataset's ids of its categories."""
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            return
        ids = {v: k for k, v in contiguous.items()}
        for result in results:
            if result["category_id"] not in ids:
                raise ValueError(
                    f"image {result['image_id']!r} has a prediction of class "
                    f"{result['category_id']}, but the dataset's classes are 0 to {len(ids) - 1}"
                )
            result["category_id"] = ids[result["category_id"]]

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, dict[str, float]]:
        """Score what was processed, on all ranks together.

        Unlike detectron2's, it leaves no `instances_predictions.pth`, which would hold the same
        predictions a second time.

        Args:
            img_ids: score these images only; None: all of the dataset.

        Returns:
            {task: {metric: AP in points}}, NaN where there is nothing to score; {} on other ranks
            than the first, without any image, and for a dataset without annotations.

        Raises:
            ValueError: for a prediction of an image that the dataset does not have.
        """
        if "box_proposals" in self._tasks:
            return super().evaluate(img_ids)
        images = self._predictions
        if self._distributed:
            comm.synchronize()
            images = list(itertools.chain(*comm.gather(images, dst=0)))
            if not comm.is_main_process():
                return {}
        if not images:
            self._logger.warning("No image was processed, so there is nothing to evaluate.")
            return {}
        packed = [image["instances"] for image in images]
        with paused_gc():
            if self._output_dir:
                write_predictions(Path(self._output_dir) / PREDICTIONS_FILE, packed)
            if not self._do_evaluation:
                self._logger.info("Annotations are not available for evaluation.")
                return {}
            return self._score(packed, img_ids)

    def _score(self, packed: list[bytes], img_ids: list[int] | None) -> dict[str, dict[str, float]]:
        self._logger.info(f"Evaluating predictions with {self.backend} ...")
        ground_truth = self._coco_api.dataset
        detections = Detections(packed, self._tasks, ground_truth)
        results = OrderedDict()
        for task in sorted(self._tasks):
            coco_eval = None  # detectron2's sign for no prediction at all, whose AP is NaN
            if len(detections):
                coco_eval = evaluate_task(
                    self._backend,
                    ground_truth,
                    detections,
                    task,
                    max_dets=self._max_dets_per_image,
                    oks_sigmas=self._kpt_oks_sigmas,
                    image_ids=img_ids,
                )
            results[task] = self._derive_coco_results(
                coco_eval, task, class_names=self._metadata.get("thing_classes")
            )
        return results


@contextmanager
def _in_coco_format(dataset_name: str) -> Iterator[str]:
    """A name in the catalogs under which a data set is a COCO file, inside the block.

    The file is not kept: whether it were still right, only reading the data set again could tell,
    and converting 5,000 images takes no more than seconds.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if hasattr(metadata, "json_file"):
        yield dataset_name
        return
    name = f"{dataset_name} in COCO's format"
    # A copy, as the conversion moves keypoints in place, which may be the data set's own.
    DatasetCatalog.register(name, lambda: copy.deepcopy(DatasetCatalog.get(dataset_name)))
    fields = {k: v for k, v in metadata.as_dict().items() if k != "name"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "annotations.json"
            MetadataCatalog.get(name).set(**fields, json_file=str(file))
            file.write_text(json.dumps(convert_to_coco_dict(name)))
            yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def coco_results(instances: Instances, image_id: int) -> list[dict[str, Any]]:
    """One image's predictions in COCO's format, but with the model's classes as categories.

    As detectron2's `instances_to_coco_json`, except that masks encoded already are passed on.

    Args:
        instances: on the CPU; fields pred_boxes, scores, pred_classes and, if predicted, pred_masks
            and pred_keypoints.
        image_id: the dataset's.
    """
    masks = instances.get("pred_masks") if instances.has("pred_masks") else None
    if not isinstance(masks, RLEMasks):
        return instances_to_coco_json(instances, image_id)
    fields = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
    results = instances_to_coco_json(Instances(instances.image_size, **fields), image_id)
    for result, rle in zip(results, masks.rles):
        result["segmentation"] = rle
    return results


def keypoint_oks_sigmas(dataset_name: str) -> list[float]:
    """A dataset's OKS sigmas, one for each keypoint type.

    Raises:
        ValueError: if its metadata has none and its keypoints are not COCO's.
    """
    metadata = MetadataCatalog.get(dataset_name)
    sigmas = metadata.get("keypoint_oks_sigmas")
    if sigmas is None and list(metadata.keypoint_names) == list(COCO_PERSON_KEYPOINT_NAMES):
        sigmas = COCO_KEYPOINT_OKS_SIGMAS
    if sigmas is None:
        raise ValueError(
            f"dataset {dataset_name!r}: its keypoints {list(metadata.keypoint_names)} are not "
            "COCO's, so their OKS sigmas must be given: 'keypoint_sigmas' in the category, or "
            "dataloader.evaluator.kpt_oks_sigmas=[...]"
        )
    return list(sigmas)


def write_results(
    path: Path,
    dataset_name: str,
    results: Mapping[str, Mapping[str, float]],
    evaluator: str,
    ms_per_image: float,
    max_detections: int = _COCO_LIMIT,
) -> None:
    """Write results.json: {"dataset", "bbox": {"AP": ...}, "segm", "keypoints", "evaluator", ...}.

    AP is in points (0 to 100); a metric that could not be computed is null. `ms_per_image` is the
    time of the model's call, post-processing included. `max_detections`, how many detections of an
    image and category count, is there where it is not COCO's 100.
    """
    content: dict[str, Any] = {"dataset": dataset_name}
    for task, metrics in results.items():
        content[task] = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    content["evaluator"] = evaluator
    if max_detections != _COCO_LIMIT:
        content["max_detections"] = max_detections
    content["ms_per_image"] = round(ms_per_image, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# What COCO's server calls a task, and the field of a prediction that it scores. A mask is sent
# without its box, whose area would else stand for the mask's where AP tells small from large.
_SUBMISSIONS = {
    "bbox": ("detections", "bbox"),
    "segm": ("detections", "segmentation"),
    "keypoints": ("person_keypoints", "keypoints"),
}


def write_submissions(
    predictions_file: Path, dataset_name: str, tasks: Iterable[str], algorithm: str = "mask-rcnn"
) -> list[Path]:
    """Write what COCO's evaluation server takes for a test set that it alone can score.

    Args:
        predictions_file: as an evaluation writes it, `PREDICTIONS_FILE`.
        dataset_name: in detectron2's catalogs; its annotation file names the set for the server:
            image_info_test-dev2017.json is "test-dev2017".
        tasks: of "bbox", "segm", "keypoints".
        algorithm: last part of the name.

    Returns:
        For each task a zip file in a folder `submission/TASK` beside the predictions, named
        TYPE_TESTSET_ALGORITHM_results.zip, in which a JSON file of the same name lies at the top.
        TYPE is "detections" or "person_keypoints". Coordinates are rounded to a tenth of a pixel,
        as COCO asks.

    Raises:
        KeyError: for another task.
    """
    metadata = MetadataCatalog.get(dataset_name)
    testset = Path(metadata.json_file).stem.removeprefix("image_info_")
    predictions = json.loads(predictions_file.read_text())
    files = []
    for task in tasks:
        kind, field = _SUBMISSIONS[task]
        name = f"{kind}_{testset}_{algorithm}_results"
        content = [
            {
                "image_id": p["image_id"],
                "category_id": p["category_id"],
                field: p[field] if task == "segm" else [round(x, 1) for x in p[field]],
                "score": p["score"],
            }
            for p in predictions
        ]
        file = predictions_file.parent / "submission" / task / f"{name}.zip"
        file.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{name}.json", json.dumps(content))
        files.append(file)
    return files


def results_table(
    results: Mapping[str, Mapping[str, float]],
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """AP of each task as a Markdown table, with the paper's below where it gives one.

    Metrics of single categories are left out.
    """
    columns = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    rows = []
    for task, metrics in results.items():
        for name, values in ((task, metrics), (f"{task} (paper)", (paper or {}).get(task, {}))):
            if values:
                rows.append([name, *(f"{values[c]:.1f}" if c in values else "" for c in columns)])
    return tabulate(rows, headers=["task", *columns], tablefmt="pipe", disable_numparse=True)
