"""What a model finds in an image: as detectron2, COCO, supervision and pandas have it."""

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from PIL import Image

from mask_rcnn_plugin.data.mapper import pixels_of, read_image
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.evaluation.pictures import draw_instances
from mask_rcnn_plugin.evaluation.predictions import coco_results


class Result:
    """Detections in one image, highest score first.

    Args:
        image: where its pixels are: a file, which is read when they are needed, or the image.
        instances: on the CPU, in the image's pixels; as `MaskRCNN` gives them.
        metadata: of the model.

    Attributes:
        image: as given.
        instances: as given.
        metadata: as given.
        file: path of the image; None where it was given itself.
    """

    def __init__(self, image: str | Image.Image, instances: Instances, metadata: Metadata) -> None:
        self.image = image
        self.instances = instances
        self.metadata = metadata
        self.file = image if isinstance(image, str) else None

    def __len__(self) -> int:
        return len(self.instances)

    def __repr__(self) -> str:
        found = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores)]
        more = ", ..." if len(found) > 5 else ""
        return f"Result({self.file or 'image'}: {', '.join(found[:5]) or 'nothing'}{more})"

    @property
    def names(self) -> list[str]:
        """Name of each detection's class."""
        return [self.metadata.thing_classes[c] for c in self.instances.pred_classes]

    @property
    def scores(self) -> list[float]:
        """Softmax probability of each detection's class."""
        return self.instances.scores.tolist()

    def above(self, confidence_threshold: float) -> "Result":
        """The detections with at least that score."""
        kept = self.instances[self.instances.scores >= confidence_threshold]
        return Result(self.image, kept, self.metadata)

    def plot(self, confidence_threshold: float = 0.5) -> np.ndarray:
        """A picture of the detections with at least that score.

        Returns:
            uint8 (H, W, 3), RGB; enlarged if it is small.
        """
        image = self.image
        pixels = read_image(image, "RGB") if isinstance(image, str) else pixels_of(image, "RGB", "")
        return draw_instances(pixels, self.above(confidence_threshold).instances, self.metadata)

    def save(self, path: str | Path, confidence_threshold: float = 0.5) -> None:
        """Write `plot`'s picture, in the format that the file's name ends with; folders are made.

        Raises:
            UserError: if the file cannot be written, or its name says no format.
        """
        picture = Image.fromarray(self.plot(confidence_threshold))
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        except (OSError, ValueError) as error:  # ValueError: no format
            reason = error if Path(path).suffix else "add .jpg or .png to its name"
            raise UserError(f"picture {str(path)!r} cannot be written: {reason}") from error

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """The detections in COCO's results format, with a "category_name" besides."""
        ids = self.metadata.thing_dataset_id_to_contiguous_id
        of_class = {class_: id_ for id_, class_ in ids.items()}
        results = coco_results(self.instances, image_id)
        for result, name in zip(results, self.names):
            result["category_id"] = of_class[result["category_id"]]
            result["category_name"] = name
        return results

    def to_supervision(self) -> Any:
        """A supervision `Detections`, names under data["class_name"], keypoints (R, K, 3) under
        data["keypoints"].
        """
        from supervision import Detections

        detections = Detections.from_detectron2({"instances": self.instances})
        detections.data["class_name"] = np.array(self.names, dtype=str)
        if self.instances.has("pred_keypoints"):
            detections.data["keypoints"] = self.instances.pred_keypoints.numpy()
        return detections

    def to_dataframe(self) -> Any:
        """A pandas `DataFrame`, a row a detection: file, name, score, box x0, y0, x1, y1 in pixels
        and, with masks, area in pixels.
        """
        from pandas import DataFrame

        columns: dict[str, Any] = {"file": self.file, "name": self.names, "score": self.scores}
        columns |= zip(("x0", "y0", "x1", "y1"), self.instances.pred_boxes.tensor.numpy().T)
        if self.instances.has("pred_masks"):
            columns["area"] = self.instances.pred_masks.sum((1, 2)).numpy()
        return DataFrame(columns)
