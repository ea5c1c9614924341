"""COCO evaluation of the plugin's predictions."""

import copy
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import detectron2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params

from mask_rcnn_plugin.data.annotation_rules import with_integers
from mask_rcnn_plugin.data.coco import DatasetError, load
from mask_rcnn_plugin.evaluation.average_precision import evaluate_tasks, find_backend
from mask_rcnn_plugin.evaluation.ground_truth import check_ground_truth, prediction_error
from mask_rcnn_plugin.evaluation.predictions import (
    PREDICTIONS_FILE,
    coco_results,
    pack,
    read_predictions,
    unpack,
    write_predictions,
    write_submissions,
)

Task = Literal["bbox", "segm", "keypoints", "box_proposals"]
COCO_LIMIT = 100  # detections of an image and category that count in AP


class ScoringError(RuntimeError):
    """AP of predictions could not be computed; the message names their file."""


class MaskRCNNCOCOEvaluator(COCOEvaluator):
    """detectron2's `COCOEvaluator`, which also takes

    * masks that are encoded already: they are passed on, not decoded and encoded again;
    * any number of detections of an image, and objects with any ids;
    * data in which some categories have keypoints and others do not. Instances without keypoints
      count as unlabelled, so keypoint AP is that of the categories that have them;
    * OKS sigmas from the dataset's metadata (`keypoint_oks_sigmas`);
    * annotations without "iscrowd": they are not crowds;
    * datasets that are not COCO files, such as LVIS, in their current state. detectron2 converts
      one once and then always scores the file in `output_dir`, whatever has changed since.

    After `evaluate`, the main process has the result of `evaluate_tasks` as `evaluated` and the
    packed predictions of each image id as `scored`, for `write_report`.

    It keeps one compressed string of an image. Numbers come from the fastest implementation of
    COCO's API that is installed, named by `backend`; they are the same on each.

    Args:
        dataset_name: a name in detectron2's catalogs, or a list of it alone.
        tasks: of "bbox", "segm", "keypoints"; or "box_proposals" alone, the average recall (AR) of
            an RPN's boxes.
        distributed: score the predictions of all ranks, on the first, or those of this one.
        output_dir: where `coco_instances_results.json`, the predictions in COCO's format, is
            written, and for a test set without annotations `submission/`, what COCO's server takes;
            nothing is written if None.
        max_detections: detections of an image and category that count in the AP of boxes and masks,
            highest scores first. Fewer than COCO's 100 do not lower the limit: AP is then the same.
            COCO scores 20 keypoint detections an image, whatever is given here.
        official: use pycocotools, COCO's own implementation, whatever else is installed.
        use_fast_impl: detectron2's name for the opposite.
        **kwargs: detectron2's.

    Raises:
        ValueError: for an unknown task; for the keypoint task on a dataset without keypoints or
            sigmas, or with another number of sigmas than of keypoints.
        DatasetError: for annotations that cannot be scored, see `check_ground_truth`.
    """

    def __init__(
        self,
        dataset_name: str | Sequence[str],
        tasks: Sequence[Task],
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_detections: int = COCO_LIMIT,
        official: bool = False,
        use_fast_impl: bool = True,
        **kwargs: Any,
    ) -> None:
        if not set(tasks) <= set(get_args(Task)):
            raise ValueError(f"tasks are {list(tasks)}, must be of {get_args(Task)}")
        if not isinstance(dataset_name, str):
            (dataset_name,) = dataset_name
        self.dataset_name = dataset_name
        self._num_keypoints = None
        if "keypoints" in tasks:
            names = MetadataCatalog.get(dataset_name).get("keypoint_names")
            if not names:
                raise ValueError(f"dataset {dataset_name!r} has no keypoints to evaluate")
            self._num_keypoints = len(names)
            given = kwargs.get("kpt_oks_sigmas")
            kwargs["kpt_oks_sigmas"] = keypoint_oks_sigmas(dataset_name, given)
        self.given_max_detections = max_detections
        kwargs.setdefault("max_dets_per_image", max(COCO_LIMIT, max_detections))
        self.evaluated: dict[str, SimpleNamespace] = {}
        self.scored: dict[Any, bytes] = {}
        self._backend = find_backend(official or not use_fast_impl)
        with in_coco_format(dataset_name) as name:
            super().__init__(
                name, tuple(tasks), distributed, output_dir, use_fast_impl=False, **kwargs
            )
        for image in self._coco_api.imgs.values():
            image.update(with_integers(image, "width", "height"))
        for annotation in self._coco_api.anns.values():
            if annotation.get("iscrowd") is None:
                annotation["iscrowd"] = 0
        check_ground_truth(dataset_name, self._coco_api, tasks, self._num_keypoints)

    @property
    def backend(self) -> str:
        """Who computes the numbers: name and version."""
        if "box_proposals" in self._tasks:
            return f"detectron2 {detectron2.__version__} box proposal recall"
        return self._backend.name

    @property
    def coco(self) -> COCO:
        """The ground truth."""
        return self._coco_api

    @property
    def max_detections(self) -> int:
        """How many detections of an image and category count in AP."""
        return self._max_dets_per_image[-1]

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the predictions of some images, packed in COCO's format; proposals as they are.

        Raises:
            ValueError: for an image or a predicted class that the dataset does not have.
        """
        if "box_proposals" in self._tasks:
            super().process(inputs, outputs)
            return
        # The dataset's ids of the model's classes. Without a mapping they are the same.
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id")
        classes = classes or {id_: id_ for id_ in self._coco_api.cats}
        category_ids = {class_: id_ for id_, class_ in classes.items()}
        for image, output in zip(inputs, outputs):
            image_id = image["image_id"]
            if image_id not in self._coco_api.imgs:
                raise ValueError(f"dataset {self.dataset_name!r} has no image {image_id!r}")
            results = coco_results(output["instances"].to(self._cpu_device), image_id)
            for result in results:
                if result["category_id"] not in category_ids:
                    raise ValueError(
                        f"image {image_id!r} has a prediction of class {result['category_id']}, "
                        f"the dataset's classes are {min(category_ids)} to {max(category_ids)}"
                    )
                result["category_id"] = category_ids[result["category_id"]]
            self._predictions.append({"image_id": image_id, "instances": pack(results)})

    def read(self, file: Path) -> None:
        """Keep the predictions of a file that `evaluate` wrote, as if a model had made them.

        Raises:
            DatasetError: if it is no such file, or one of another dataset or other tasks.
        """
        self.reset()
        root = self._metadata.get("image_root", "")
        images = self._coco_api.imgs.items()
        files = {
            f"{root}/{image['file_name']}": id_ for id_, image in images if "file_name" in image
        }
        predictions = read_predictions(file, files=files)
        unknown = predictions.keys() - self._coco_api.imgs.keys()
        if unknown:
            raise DatasetError(
                f"predictions file {str(file)!r}: {self.dataset_name!r} has no image "
                f"{next(iter(unknown))!r}"
            )
        for image_id, image in self._coco_api.imgs.items():
            for result in predictions[image_id]:
                wrong = prediction_error(
                    result, image, self._coco_api.cats, self._tasks, self._num_keypoints
                )
                if wrong:
                    what = f"predictions file {str(file)!r}, image {image_id!r}"
                    raise DatasetError(f"{what}: {wrong}")
            packed = pack(predictions[image_id])
            self._predictions.append({"image_id": image_id, "instances": packed})

    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, dict[str, float]]:
        """Score what was processed, on all ranks together.

        The other ranks return when the first one has their predictions; it is for the caller to
        wait for the numbers.

        Args:
            img_ids: score these images only; None: all of the dataset.

        Returns:
            AP in points by task and metric, NaN where there is nothing to score; {} on other ranks
            than the first, without any image, and for a dataset without annotations.

        Raises:
            ScoringError: if AP cannot be computed; the predictions are on disk.
        """
        if "box_proposals" in self._tasks:
            return super().evaluate(img_ids)
        images = self._predictions
        if self._distributed:
            gathered = comm.gather(images, dst=0)  # on the CPU's process group
            if not comm.is_main_process():
                return {}
            images = list(itertools.chain(*gathered))
        if not images:
            self._logger.warning("No image was processed, so there is nothing to evaluate.")
            return {}
        packed = [image["instances"] for image in images]
        self.scored = {image["image_id"]: image["instances"] for image in images}
        file = Path(self._output_dir) / PREDICTIONS_FILE if self._output_dir else None
        if file:
            write_predictions(file, packed)
            self._logger.info("Wrote the predictions to %s", file)
        if not self._do_evaluation:
            self._submit(packed)
            return {}
        try:
            return self._score(packed, img_ids)
        except Exception as error:
            raise ScoringError(
                f"AP could not be computed by {self.backend} ({type(error).__name__}: {error})"
                + (f"; the predictions are in {file}" if file else "")
            ) from error

    def _submit(self, packed: list[bytes]) -> None:
        self._logger.warning("%s has no annotations, so there is no AP", self.dataset_name)
        if self._output_dir:
            # The file that lists COCO's test images is image_info_test-dev2017.json.
            testset = Path(self._metadata.json_file).stem.removeprefix("image_info_")
            folder = Path(self._output_dir) / "submission"
            for file in write_submissions(folder, packed, testset, self._tasks):
                self._logger.info("Wrote %s for COCO's evaluation server", file)

    def _score(self, packed: list[bytes], img_ids: list[Any] | None) -> dict[str, dict[str, float]]:
        self._logger.info("Evaluating predictions with %s ...", self.backend)
        if not any(map(unpack, packed)):
            self._logger.warning(
                "Nothing was detected in any of the %d images: AP is 0 wherever there are objects.",
                len(packed),
            )
        self.evaluated = evaluate_tasks(
            self._backend,
            self._coco_api.dataset,
            packed,
            sorted(self._tasks),
            max_dets=self._max_dets_per_image,
            oks_sigmas=self._kpt_oks_sigmas,
            image_ids=img_ids,
        )
        class_names = self._metadata.get("thing_classes")
        return {
            task: self._derive_coco_results(coco_eval, task, class_names=class_names)
            for task, coco_eval in self.evaluated.items()
        }


@contextmanager
def in_coco_format(dataset_name: str, *, numbered: bool = False) -> Iterator[str]:
    """A name in the catalogs under which a dataset is a COCO file, inside the block.

    Args:
        numbered: convert what the loader gives, even if the dataset has a file, and number its
            images from 1, whose ids may be anything.
    """
    metadata = MetadataCatalog.get(dataset_name)
    as_coco = str(metadata.get("evaluator_type", "coco")).startswith("coco")
    if not numbered and as_coco and hasattr(metadata, "json_file"):
        yield dataset_name
        return
    # A copy, as the conversion moves keypoints in place, which may be the dataset's own.
    records = copy.deepcopy(load(dataset_name))
    if numbered:
        records = [{**record, "image_id": i} for i, record in enumerate(records, 1)]
    name = f"{dataset_name} in COCO's format"
    DatasetCatalog.register(name, lambda: records)
    fields = {k: v for k, v in metadata.as_dict().items() if k not in ("name", "json_file")}
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "annotations.json"
            MetadataCatalog.get(name).set(**fields, json_file=str(file))
            document = convert_to_coco_dict(name)
            for category in document["categories"]:
                if category["name"] in metadata.get("keypoint_classes", [category["name"]]):
                    category["keypoints"] = list(metadata.get("keypoint_names") or [])
            file.write_text(json.dumps(document, default=lambda array: array.tolist()))
            yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def keypoint_oks_sigmas(dataset_name: str, given: Sequence[float] | None = None) -> list[float]:
    """OKS sigmas for a dataset, one for each keypoint type: the given ones, else its own.

    Raises:
        ValueError: if there are none and its keypoints are not COCO's, or if their number is wrong.
    """
    metadata = MetadataCatalog.get(dataset_name)
    names = list(metadata.keypoint_names)
    sigmas = given or metadata.get("keypoint_oks_sigmas")
    if sigmas is None and names == list(COCO_PERSON_KEYPOINT_NAMES):
        sigmas = Params("keypoints").kpt_oks_sigmas.tolist()  # COCO's
    if sigmas is None:
        raise ValueError(
            f"dataset {dataset_name!r}: its keypoints {names} are not COCO's, so their OKS sigmas "
            "must be given: 'keypoint_sigmas' in the category, or "
            "dataloader.evaluator.kpt_oks_sigmas=[...]"
        )
    if len(sigmas) != len(names):
        raise ValueError(
            f"dataloader.evaluator.kpt_oks_sigmas has {len(sigmas)} values, but dataset "
            f"{dataset_name!r} has {len(names)} keypoints: give one for each"
        )
    return list(sigmas)
