"""Pictures of predictions beside their ground truth, and of what a model is trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageOps

from mask_rcnn_plugin.data.mapper import read_image
from mask_rcnn_plugin.evaluation.predictions import iterate_predictions
from mask_rcnn_plugin.fast.mask_rle import RLEMasks

logger = logging.getLogger(__name__)

# Drawn pictures are at least this high, so that labels can be read on small images; unless they
# are four times as wide as high.
_MIN_HEIGHT = 480

_PARTS = ("segmentation", "keypoints")  # what an annotation may lack


def draw_predictions(
    images: Sequence[dict[str, Any]],
    metadata: Metadata,
    predictions_file: Path,
    output_dir: Path,
    count: int,
    score_threshold: float = 0.5,
) -> list[Path]:
    """Write pictures: ground truth on the left, predictions on the right.

    Args:
        images: of the dataset, as detectron2 loads them; they are taken in order.
        predictions_file: as an evaluation writes it.
        output_dir: made if missing.
        count: how many images to draw, at most.
        score_threshold: predictions below it are left out; a warning if those are all.

    Returns:
        The files, named IMAGE-ID_NAME.jpg.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    ids = {image["file_name"]: image["image_id"] for image in images}
    shown: dict[Any, list[dict[str, Any]]] = {i["image_id"]: [] for i in images[:count]}
    best = None
    for p in iterate_predictions(predictions_file, ids):
        best = p["score"] if best is None else max(best, p["score"])
        if p["score"] >= score_threshold and p["image_id"] in shown:
            shown[p["image_id"]].append(p)
    if best is None or best < score_threshold:
        logger.warning(
            "No prediction has a score of %g or more, so none is drawn; %s",
            score_threshold,
            "there are none" if best is None else f"the best has {best:.3g}",
        )
    files = []
    for image in images[:count]:
        truth = draw_truth(image, metadata)
        predicted = draw_prediction(image, shown[image["image_id"]], metadata)
        file = output_dir / f"{image['image_id']}_{Path(image['file_name']).stem}.jpg"
        cv2.imwrite(str(file), np.hstack([truth, predicted])[:, :, ::-1])
        files.append(file)
    return files


def draw_truth(image: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """The ground truth of an image in detectron2's dataset format.

    Returns:
        uint8 (H, W, 3), RGB; enlarged if it is small.
    """
    # The visualizer wants masks on all instances or on none, keypoints likewise.
    annotations = [
        {k: v for k, v in a.items() if k not in _PARTS or (v is not None and len(v))}
        for a in image.get("annotations", [])
    ]
    if most := max((len(a.get("keypoints", ())) for a in annotations), default=0):
        annotations = [{"keypoints": [0.0] * most, **a} for a in annotations]
    if any("segmentation" in a for a in annotations):
        annotations = [{"segmentation": [], **a} for a in annotations]
    visualizer = _visualizer(read_image(image["file_name"], "RGB"), metadata)
    return visualizer.draw_dataset_dict({**image, "annotations": annotations}).get_image()


def draw_prediction(
    image: dict[str, Any], predictions: list[dict[str, Any]], metadata: Metadata
) -> np.ndarray:
    """An image's predictions in COCO's results format, drawn as `draw_truth` draws."""
    pixels = read_image(image["file_name"], "RGB")
    instances = _to_instances(predictions, pixels.shape[:2], metadata)
    return draw_instances(pixels, instances, metadata)


def draw_instances(pixels: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """A model's predictions on an image.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        instances: on the CPU, in its pixels.

    Returns:
        uint8 (H, W, 3), RGB; enlarged if it is small.
    """
    instances = hide_keypoints(instances, metadata)
    return _visualizer(pixels, metadata).draw_instance_predictions(instances).get_image()


def hide_keypoints(instances: Instances, metadata: Metadata) -> Instances:
    """Predictions whose keypoints are 0 where the class has none, as detectron2 does not draw
    those; a model predicts them for any detection."""
    if not instances.has("pred_keypoints"):
        return instances
    with_keypoints = metadata.get("keypoint_classes", metadata.thing_classes)
    has = [metadata.thing_classes[c] in with_keypoints for c in instances.pred_classes]
    shown = Instances(instances.image_size, **instances.get_fields())
    shown.pred_keypoints = instances.pred_keypoints * torch.tensor(has)[:, None, None]
    return shown


def draw_inputs(
    batch: Sequence[dict[str, Any]], metadata: Metadata, image_format: str, columns: int = 4
) -> np.ndarray:
    """What a model is trained on: images as the mapper gives them, with their ground truth.

    Args:
        batch: with "image", uint8 (3, H, W) in `image_format`, and "instances".
        columns: of the grid, at most.

    Returns:
        A grid of pictures, uint8 (H, W, 3), RGB, 480 pixels a side, the images scaled to fit.
    """
    tiles = []
    for image in batch:
        pixels = convert_image_to_rgb(image["image"].permute(1, 2, 0), image_format)
        truth = image["instances"].to("cpu")
        fields = {k.removeprefix("gt_"): v for k, v in truth.get_fields().items()}
        names = [metadata.thing_classes[c] for c in fields.pop("classes").tolist()]
        shown = {k: fields[k] for k in ("boxes", "masks", "keypoints") if k in fields}
        visualizer = _visualizer(pixels.astype(np.uint8), metadata)
        picture = Image.fromarray(visualizer.overlay_instances(labels=names, **shown).get_image())
        size = _MIN_HEIGHT, _MIN_HEIGHT
        tiles.append(np.asarray(ImageOps.pad(picture, size, color="white", centering=(0, 0))))
    columns = min(columns, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    return np.vstack(rows)


def _visualizer(pixels: np.ndarray, metadata: Metadata) -> Visualizer:
    height, width = pixels.shape[:2]
    scale = min(_MIN_HEIGHT / height, 4 * _MIN_HEIGHT / width)  # a thin one takes no gigabytes
    return Visualizer(pixels, metadata, scale=max(1.0, scale))


def _to_instances(
    predictions: list[dict[str, Any]], image_size: tuple[int, int], metadata: Metadata
) -> Instances:
    """Predictions of one image in COCO's format as a detectron2 model gives them."""
    to_class = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = [p["category_id"] for p in predictions]
    classes = [to_class[id_] for id_ in ids] if to_class else ids
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
        instances.pred_keypoints = keypoints
    return instances
