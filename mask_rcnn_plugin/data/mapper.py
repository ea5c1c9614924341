"""From a dataset dict to the model's input."""

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from mask_rcnn_plugin.data.coco import DatasetError


class ImageError(DatasetError):
    """An image file that is missing, cannot be decoded or has another size than its dataset says.

    Args:
        file_name: of the image; an attribute too.
        reason: None as torch's DataLoader calls it, which rebuilds what a worker raised from its
            traceback as one text: `file_name` is then that text.
    """

    def __init__(self, file_name: str, reason: str | None = None) -> None:
        if reason is None:
            message = file_name.rpartition("ImageError: image ")[2].strip()
            file_name, _, reason = message.partition(": ")
        super().__init__(file_name, reason)
        self.file_name = file_name

    def __str__(self) -> str:
        return "image {}: {}".format(*self.args)


class MaskRCNNDatasetMapper(DatasetMapper):
    """detectron2's `DatasetMapper` for images whose instances are not all alike.

    detectron2 decides from the first instance what all of an image's instances have. Here

    * an instance without keypoints among others with keypoints has none labelled (visibility 0),
      e.g. a ball beside a person;
    * polygons and run-length encodings may stand side by side: the masks of an image are kept as
      polygons if all are, else as bitmaps.

    Arguments as `DatasetMapper`; `keypoint_hflip_indices` also tells the number of keypoints, and
    `instance_mask_format` is not taken.
    """

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        annotations = dataset_dict["annotations"]
        if self.use_keypoint:
            for annotation in annotations:
                annotation.setdefault("keypoints", [0.0] * 3 * len(self.keypoint_hflip_indices))
        if self.use_instance_mask:
            kept = [a for a in annotations if not a.get("iscrowd", 0)]
            for annotation in kept:
                if "segmentation" not in annotation:
                    raise ValueError(
                        f"{dataset_dict['file_name']}: an instance at {annotation['bbox']} has no "
                        "'segmentation', which training a mask branch needs for every instance"
                    )
            all_polygons = all(isinstance(a["segmentation"], list) for a in kept)
            self.instance_mask_format = "polygon" if all_polygons else "bitmask"
        super()._transform_annotations(dataset_dict, transforms, image_shape)
