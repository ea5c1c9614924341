"""COCO evaluation of the plugin's predictions."""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import detectron2
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from tabulate import tabulate

from mask_rcnn_plugin.data.coco import COCO_KEYPOINT_OKS_SIGMAS
from mask_rcnn_plugin.modeling.mask_rle import RLEMasks

PREDICTIONS_FILE = "coco_instances_results.json"


class MaskRCNNCOCOEvaluator(COCOEvaluator):
    """detectron2's `COCOEvaluator`, which also takes

    * masks that are encoded already: they are passed on, not decoded and encoded again;
    * data in which some categories have keypoints and others do not. Instances without keypoints
      count as unlabelled, so keypoint AP is that of the categories that have them;
    * OKS sigmas from the dataset's metadata (`keypoint_oks_sigmas`).

    Args:
        dataset_name: a name in detectron2's catalogs.
        tasks: of "bbox", "segm", "keypoints"; or "box_proposals" alone, the average recall (AR) of
            an RPN's boxes.
        output_dir: where `coco_instances_results.json`, the predictions in COCO's format, is
            written; none if None.

    Raises:
        ValueError: for the keypoint task on a dataset without keypoints or sigmas.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...],
        output_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        if "keypoints" in tasks:
            names = metadata.get("keypoint_names")
            if not names:
                raise ValueError(f"dataset {dataset_name!r} has no keypoints to evaluate")
            if not kwargs.get("kpt_oks_sigmas"):
                kwargs["kpt_oks_sigmas"] = keypoint_oks_sigmas(dataset_name)
        super().__init__(dataset_name, tuple(tasks), output_dir=output_dir, **kwargs)
        if "keypoints" in tasks:
            for annotation in self._coco_api.anns.values():
                annotation.setdefault("keypoints", [0] * 3 * len(names))
                annotation.setdefault("num_keypoints", 0)

    @property
    def backend(self) -> str:
        """Who computes the numbers: name and version."""
        if "box_proposals" in self._tasks:
            return f"detectron2 {detectron2.__version__} box proposal recall"
        if self._use_fast_impl:
            return f"detectron2 {detectron2.__version__} COCOeval_opt"
        return f"pycocotools {version('pycocotools')}"

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the predictions of some images, in COCO's format; proposals as they are."""
        for image, output in zip(inputs, outputs):
            if "proposals" in output:
                proposals = output["proposals"].to(self._cpu_device)
                self._predictions.append({"image_id": image["image_id"], "proposals": proposals})
                continue
            instances = output["instances"].to(self._cpu_device)
            masks = instances.get("pred_masks") if instances.has("pred_masks") else None
            if isinstance(masks, RLEMasks):
                instances.remove("pred_masks")
            results = instances_to_coco_json(instances, image["image_id"])
            if isinstance(masks, RLEMasks):
                for result, rle in zip(results, masks.rles):
                    result["segmentation"] = rle
            self._predictions.append({"image_id": image["image_id"], "instances": results})


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
) -> None:
    """Write results.json: {"dataset", "bbox": {"AP": ...}, "segm", "keypoints", "evaluator", ...}.

    AP is in points (0 to 100); a metric that could not be computed is null. `ms_per_image` is the
    time of the model's call, post-processing included.
    """
    content: dict[str, Any] = {"dataset": dataset_name}
    for task, metrics in results.items():
        content[task] = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    content["evaluator"] = evaluator
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
