"""Pictures of predictions beside their ground truth."""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from mask_rcnn_plugin.evaluation.predictions import read_predictions
from mask_rcnn_plugin.fast.mask_rle import RLEMasks

logger = logging.getLogger(__name__)

# Drawn pictures are at least this high, so that labels can be read on small images.
_MIN_HEIGHT = 480


def draw_predictions(
    dataset_names: list[str],
    predictions_file: Path,
    output_dir: Path,
    count: int,
    score_threshold: float = 0.5,
) -> list[Path]:
    """Write pictures: ground truth on the left, predictions on the right.

    Args:
        dataset_names: in detectron2's catalogs; their images are taken in order.
        predictions_file: as an evaluation writes it.
        output_dir: made if missing.
        count: how many images to draw, at most.
        score_threshold: predictions below it are left out; a warning if those are all.

    Returns:
        The files, named IMAGE-ID_NAME.jpg.
    """
    predictions = read_predictions(predictions_file, score_threshold)
    if not predictions:
        everything = read_predictions(predictions_file).values()
        best = max((p["score"] for image in everything for p in image), default=None)
        logger.warning(
            "No prediction reaches a score of %g (--confidence-threshold), so none is drawn; %s",
            score_threshold,
            "there are none" if best is None else f"the best is {best:.3g}",
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for name in dataset_names:
        metadata = MetadataCatalog.get(name)
        for image in DatasetCatalog.get(name)[: count - len(files)]:
            truth = draw_truth(image, metadata)
            predicted = draw_prediction(image, predictions[image["image_id"]], metadata)
            picture = np.concatenate([truth, predicted], axis=1)[:, :, ::-1]
            file = output_dir / f"{image['image_id']}_{Path(image['file_name']).stem}.jpg"
            cv2.imwrite(str(file), picture)
            files.append(file)
    return files


def draw_truth(image: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """The ground truth of an image in detectron2's dataset format.

    Returns:
        uint8 (H, W, 3), RGB; enlarged if it is small.
    """
    # The visualizer wants keypoints on all instances or on none.
    annotations = image.get("annotations", [])
    if any("keypoints" in a for a in annotations):
        none = [0.0] * 3 * len(metadata.keypoint_names)
        annotations = [{"keypoints": none, **a} for a in annotations]
    visualizer = _visualizer(image, metadata)
    return visualizer.draw_dataset_dict({**image, "annotations": annotations}).get_image()


def draw_prediction(
    image: dict[str, Any], predictions: list[dict[str, Any]], metadata: Metadata
) -> np.ndarray:
    """An image's predictions in COCO's results format, drawn as `draw_truth` draws."""
    visualizer = _visualizer(image, metadata)
    instances = _to_instances(predictions, visualizer.img.shape[:2], metadata)
    return visualizer.draw_instance_predictions(instances).get_image()


def _visualizer(image: dict[str, Any], metadata: Metadata) -> Visualizer:
    pixels = read_image(image["file_name"], format="RGB")
    return Visualizer(pixels, metadata, scale=max(1.0, _MIN_HEIGHT / pixels.shape[0]))


def _to_instances(
    predictions: list[dict[str, Any]], image_size: tuple[int, int], metadata: Metadata
) -> Instances:
    """Predictions of one image in COCO's format as a detectron2 model gives them."""
    to_class = metadata.get("thing_dataset_id_to_contiguous_id")
    classes = [to_class[p["category_id"]] for p in predictions]
    boxes = torch.tensor([p["bbox"] for p in predictions]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # from width and height
    instances = Instances(
        image_size,
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([p["score"] for p in predictions]),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )
    if all("segmentation" in p for p in predictions):
        instances.pred_masks = RLEMasks([p["segmentation"] for p in predictions], image_size)
    if predictions and all("keypoints" in p for p in predictions):
        keypoints = torch.tensor([p["keypoints"] for p in predictions])
        keypoints = keypoints.reshape(len(predictions), -1, 3)
        keypoints[:, :, :2] += 0.5  # from pixel indices to continuous coordinates
        # A detection of a category without keypoints has them predicted all the same.
        with_keypoints = metadata.get("keypoint_classes", metadata.thing_classes)
        has = [metadata.thing_classes[c] in with_keypoints for c in classes]
        instances.pred_keypoints = keypoints * torch.tensor(has)[:, None, None]
    return instances
