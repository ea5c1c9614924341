"""From a dataset dict to the model's input."""

import copy
import logging
from importlib.util import find_spec
from typing import Any, Literal

import cv2
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.annotation_rules import annotation_faults
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.data.image_doubts import has_16_bits, is_dark, pages

logger = logging.getLogger(__name__)

_WARNINGS = 10


class ImageError(DatasetError):
    """An image file that is missing, cannot be decoded or has another size than its dataset says.

    Args:
        file_name: of the image; an attribute too.
        reason: what is wrong. Empty where torch's DataLoader rebuilds the error of a worker, with
            the traceback as `file_name`.
    """

    def __init__(self, file_name: str, reason: str = "") -> None:
        if not reason:
            message = file_name.rpartition("ImageError: image ")[2].strip()
            file_name, _, reason = message.partition(": ")
        super().__init__(file_name, reason)
        self.file_name = file_name

    def __str__(self) -> str:
        return "image {}: {}".format(*self.args)


class MaskRCNNDatasetMapper(DatasetMapper):
    """detectron2's `DatasetMapper` for images whose instances are not all alike, or not all sound.

    detectron2 decides from the first instance what all of an image's instances have. Here

    * an instance without keypoints has none labelled (visibility 0), e.g. a ball beside a person;
    * the masks of an image are kept as polygons if all are polygons, else as bitmaps;
    * an instance that cannot be trained on (`annotation_faults`) is left out. A warning names the
      first 10 in each process, then one at each doubling of their number. An image that loses all
      its instances is background.

    Images of 16 bits a channel are read as the upper 8 of them. Semantic segmentation is not read.

    Arguments as `DatasetMapper`; `keypoint_hflip_indices` also tells the number of keypoints, and
    `instance_mask_format` is not taken. `resize` is "pillow", as detectron2 does it, or "opencv",
    which takes a fifth of the time; see `resize_with_opencv`.
    """

    def __init__(
        self, *args: Any, resize: Literal["pillow", "opencv"] = "pillow", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # How an image is given to the augmentations, also by `Predictor`.
        self.augmentation_input = {"pillow": T.AugInput, "opencv": _OpenCVInput}[resize]
        if resize == "opencv":
            cv2.setNumThreads(0)  # workers are processes enough, and forked ones may hang with them
        crops = [a for a in self.augmentations.augs if "Crop" in type(a).__name__]
        if crops and self.is_train and self.use_instance_mask and not find_spec("shapely"):
            raise ConfigError(f"{type(crops[0]).__name__} of polygons needs `pip install shapely`")
        self._dropped: set[tuple[str, int]] = set()

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: of one image, in detectron2's format; not changed.

        Returns:
            The same with "image", a (C, H, W) uint8 tensor after augmentation, and in training
            "instances" in place of "annotations".

        Raises:
            ImageError: if the image cannot be read or has another size than stated, in training
                and evaluation alike.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        image = np.require(image, requirements="W")  # torch warns of others, as RGB's is
        _check_size(dataset_dict, image)
        augmented = self.augmentation_input(image)
        transforms = self.augmentations(augmented)
        image_shape = augmented.image.shape[:2]
        pixels = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(pixels)
        if self.proposal_topk is not None:
            utils.transform_proposals(
                dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image_shape)
        return dataset_dict

    def _transform_annotations(
        self,
        dataset_dict: dict[str, Any],
        transforms: T.TransformList,
        image_shape: tuple[int, int],
    ) -> None:
        annotations = []
        for index, annotation in enumerate(dataset_dict["annotations"]):
            if annotation.pop("iscrowd", 0) == 1:
                continue
            reason = self._prepare(annotation, dataset_dict["width"], dataset_dict["height"])
            if reason is None:
                annotations.append(annotation)
            else:
                self._warn(dataset_dict, index, reason)
        dataset_dict["annotations"] = annotations
        if not annotations:  # detectron2's recompute_boxes would look for their masks
            del dataset_dict["annotations"]
            dataset_dict["instances"] = utils.annotations_to_instances([], image_shape)
            return
        # Padding is no part of a mask; newer detectron2 fills it with 255, for semantic maps.
        transforms = T.TransformList(
            [
                T.PadTransform(t.x0, t.y0, t.x1, t.y1) if isinstance(t, T.PadTransform) else t
                for t in transforms.transforms
            ]
            + [_WritableMasks()]
        )
        if self.use_instance_mask:
            all_polygons = all(isinstance(a["segmentation"], list) for a in annotations)
            self.instance_mask_format = "polygon" if all_polygons else "bitmask"
        super()._transform_annotations(dataset_dict, transforms, image_shape)

    def _prepare(self, annotation: dict[str, Any], width: int, height: int) -> str | None:
        """Bring one instance into the form that detectron2 expects of all; what is wrong, if so."""
        num_keypoints = len(self.keypoint_hflip_indices) if self.use_keypoint else None
        if not self.use_instance_mask:
            annotation.pop("segmentation", None)
        if num_keypoints is None:
            annotation.pop("keypoints", None)
        elif (keypoints := annotation.get("keypoints")) is None or not len(keypoints):
            annotation["keypoints"] = [0.0] * 3 * num_keypoints
        faults = annotation_faults(
            {**annotation, "bbox": _xywh(annotation.get("bbox"), annotation["bbox_mode"])},
            *(width, height, num_keypoints),
            needs_mask=self.use_instance_mask,
        )
        if faults:
            return faults[0][1]
        # Of integers detectron2 makes arrays of integers, which a resize cuts to whole pixels.
        annotation["bbox"] = [float(x) for x in annotation["bbox"]]
        mask = annotation.get("segmentation")
        if isinstance(mask, list | tuple):
            annotation["segmentation"] = [np.asarray(polygon, dtype=float) for polygon in mask]
        elif isinstance(mask, dict) and isinstance(mask["counts"], list):
            annotation["segmentation"] = coco_mask.frPyObjects(mask, height, width)
        return None

    def _warn(self, dataset_dict: dict[str, Any], index: int, reason: str) -> None:
        file_name, annotation = dataset_dict["file_name"], dataset_dict["annotations"][index]
        if (file_name, index) in self._dropped:
            return
        self._dropped.add((file_name, index))
        count = len(self._dropped)
        if count <= _WARNINGS or count & (count - 1) == 0:
            which = f"id {annotation['id']}" if "id" in annotation else f"index {index}"
            logger.warning(
                "image %s: left out the annotation with %s: %s (%d left out so far)",
                *(file_name, which, reason, count),
            )


class _WritableMasks(T.NoOpTransform):
    """Copies what Pillow has resized, which torch warns of."""

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return np.require(segmentation, requirements="W")


class _OpenCVInput(T.AugInput):
    image: np.ndarray

    def transform(self, tfm: T.Transform) -> None:
        plain = isinstance(tfm, T.ResizeTransform) and tfm.interp == Image.Resampling.BILINEAR
        if plain and self.image.dtype == np.uint8:
            self.image = resize_with_opencv(self.image, tfm.new_h, tfm.new_w)
        else:
            super().transform(tfm)


def resize_with_opencv(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, ...) uint8: bilinearly if it becomes larger, else by the mean of each area.

    Enlarged, pixels differ from those of Pillow's bilinear filter by 1 at most; made smaller, by
    more, as that filter weights the pixels of a wider area.
    """
    smaller = height < image.shape[0] or width < image.shape[1]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=method)
    return resized.reshape(height, width, *image.shape[2:])  # OpenCV drops a single channel


def _xywh(box: Any, mode: BoxMode) -> Any:
    if mode == BoxMode.XYWH_ABS:
        return box
    try:
        return BoxMode.convert(
            BoxMode.convert(box, mode, BoxMode.XYXY_ABS), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
        )
    except (AssertionError, TypeError, ValueError, OverflowError, RuntimeError):
        return box  # no four numbers, as `annotation_faults` will say


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """As detectron2's `read_image`, (H, W, C), but 16 bits are not clipped to 8, nor PNGs mended.

    What `image_doubts` finds is logged for the first such image of a process.

    Raises:
        ImageError: whatever is wrong with the file.
    """
    try:
        with PathManager.open(file_name, "rb") as file:
            image: Image.Image = Image.open(file)
            count, deep = pages(image), has_16_bits(image)
            # Here, not in detectron2's look at the EXIF data, which decodes a PNG and then takes
            # what is broken for pixels of 0.
            image.load()
        pixels = pixels_of(image, image_format, file_name)
        _log_doubts(file_name, pixels, count, deep)
        return pixels
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(file_name, "it does not exist") from error
    except UnidentifiedImageError as error:
        raise ImageError(file_name, "it is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        reason = f"it has more pixels than Pillow opens ({error}): cut it into tiles"
        raise ImageError(file_name, reason) from error
    except Exception as error:  # Pillow raises many kinds on broken files
        raise ImageError(
            file_name, f"it cannot be decoded ({type(error).__name__}: {error})"
        ) from error


def pixels_of(image: Image.Image, image_format: str, name: str) -> np.ndarray:
    """A Pillow image as `read_image` gives a file's; `name` is for the error.

    Raises:
        ImageError: if it has more than 8 bits a channel, and nothing says what is white.
    """
    kind, mode, deep = image.format, image.mode, has_16_bits(image)
    image = utils._apply_exif_orientation(image)
    if deep:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = f"its pixels ({kind}, mode {mode!r}) have no known range"
        raise ImageError(name, f"{what}: convert it to 8 bits per channel")
    return utils.convert_PIL_to_numpy(image, image_format)


def _log_doubts(file_name: str, pixels: np.ndarray, count: int, deep: bool) -> None:
    if count > 1:
        log_first_n(
            logging.WARNING,
            f"image {file_name}: only the first of its {count} pages or frames is read; save each "
            "as an image of its own. Further images like it are not reported",
            name=__name__,
        )
    if is_dark(pixels, deep):
        log_first_n(
            logging.WARNING,
            f"image {file_name}: it is nearly black, its largest value is {pixels.max()} of 255; "
            "if it has 10 to 14 bits in 16, scale all images to the full range, e.g. 12 bits by "
            "16. Further images like it are not reported",
            name=__name__,
        )


def _check_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    try:
        utils.check_image_size(dataset_dict, image)
    except utils.SizeMismatchError as error:
        height, width = image.shape[:2]
        raise ImageError(
            dataset_dict["file_name"],
            f"it is {width} x {height} pixels (EXIF rotation applied), but its dataset says "
            f"{dataset_dict['width']} x {dataset_dict['height']}: correct 'width' and 'height' in "
            "the annotation file, and the annotations if they were made at another size",
        ) from error
