"""From an image to detections: a trained model with everything it needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, Metadata
from detectron2.data import transforms as T
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from mask_rcnn_plugin.config import ConfigError, get_config
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.data.mapper import ImageError, pixels_of, read_image
from mask_rcnn_plugin.data.metadata import metadata_of
from mask_rcnn_plugin.inference.optimize import optimize_for_inference
from mask_rcnn_plugin.inference.result import Result
from mask_rcnn_plugin.weights import WeightsError, WeightsLoader, resolve_weights
from mask_rcnn_plugin.weights.files import contents

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray


class Predictor:
    """A model that takes images as they come, prepared as its config prepares them for a test.

    As detectron2's `DefaultPredictor`, for LazyConfigs.

    Args:
        model: a detectron2 model, in evaluation mode.
        mapper: of the test images: their augmentations and format.
        metadata: names of the model's classes and keypoints.
    """

    def __init__(self, model: nn.Module, mapper: DatasetMapper, metadata: Metadata) -> None:
        self.model = model
        self.metadata = metadata
        self.mapper = mapper

    @classmethod
    def from_config(
        cls,
        cfg: DictConfig,
        weights: str,
        *,
        device: str | torch.device | None = None,
        optimize: bool = True,
    ) -> "Predictor":
        """
        Args:
            cfg: from `get_config`; unchanged.
            weights: a file, a detectron2:// address or a model-zoo name.
            device: None: that of the config, and the CPU for "cuda" where there is no GPU.
            optimize: run the model through `optimize_for_inference`.

        Raises:
            ConfigError: if `dataloader.test.mapper` is not a `DatasetMapper`, or `device` is not
                there.
            WeightsError: if the weights do not exist or do not fit the model.
        """
        mapper = instantiate(cfg.dataloader.test.mapper)
        if not isinstance(mapper, DatasetMapper):
            raise ConfigError(
                f"dataloader.test.mapper is a {type(mapper).__name__}, must be a DatasetMapper, "
                "whose augmentations are applied to images without a dataset too"
            )
        model = instantiate(cfg.model).eval()
        try:
            model.to(device or device_of(cfg))
        except (RuntimeError, AssertionError) as error:  # no such device, or without room
            raise ConfigError(
                f"device is {str(device or cfg.train.device)!r}, must be 'cpu', 'cuda' or 'cuda:N' "
                f"of this machine; torch says: {str(error).splitlines()[0]}"
            ) from error
        WeightsLoader(model).load_strictly(weights)
        return cls(optimize_for_inference(model) if optimize else model, mapper, metadata_of(cfg))

    @property
    def names(self) -> list[str]:
        """Names of the model's classes."""
        return list(self.metadata.thing_classes)

    @overload
    def __call__(self, images: ImageLike, *, batch_size: int = 1) -> Result: ...

    @overload
    def __call__(self, images: list[ImageLike], *, batch_size: int = 1) -> list[Result]: ...

    def __call__(
        self, images: ImageLike | list[ImageLike], *, batch_size: int = 1
    ) -> Result | list[Result]:
        """Find objects in one image or several.

        Args:
            images: a file's path or file:// URL, a Pillow image, a NumPy array uint8 (H, W, 3) in
                BGR order, as OpenCV reads it, or (H, W) of grey; or a list of them.
            batch_size: how many of a list the model sees at once.

        Returns:
            A `Result`, or a list of them.

        Raises:
            ImageError: for what is not an image or cannot be read.
            ValueError: for a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be 1 or more")
        if not isinstance(images, list):
            return self._predict([images])[0]
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        return [result for batch in batches for result in self._predict(batch)]

    def _predict(self, images: Sequence[ImageLike]) -> list[Result]:
        sources = [_source(image) for image in images]
        inputs = [self._input(source) for source in sources]
        with torch.no_grad():
            outputs = self.model(inputs)
        return [
            Result(source, output["instances"].to("cpu"), self.metadata)
            for source, output in zip(sources, outputs)
        ]

    def prepare(self, image: ImageLike) -> dict[str, Any]:
        """What the model takes of an image.

        Raises:
            ImageError: for what is not an image or cannot be read.
        """
        return self._input(_source(image))

    @property
    def augmentation_input(self) -> type[T.AugInput]:
        """How the mapper gives an image to the augmentations, which says how it is resized."""
        return getattr(self.mapper, "augmentation_input", T.AugInput)

    def _input(self, source: str | Image.Image) -> dict[str, Any]:
        """As the mapper makes it of a dataset's image."""
        order = self.mapper.image_format
        if isinstance(source, str):
            name, pixels = source, read_image(source, order)
        else:
            name, pixels = "given", pixels_of(source, order, "given")
        augmented = self.augmentation_input(pixels)
        try:
            self.mapper.augmentations(augmented)
        except Exception as error:  # e.g. of one pixel's height, which a resize makes none of
            size = "{1} x {0}".format(*pixels.shape)
            raise ImageError(name, f"its {size} pixels cannot be resized: {error}") from error
        image = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": image, "height": pixels.shape[0], "width": pixels.shape[1]}


def _source(image: object) -> str | Image.Image:
    """A path, or a Pillow image.

    Raises:
        ImageError: for anything else.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        path = str(image)
        path = url2pathname(urlparse(path).path) if path.startswith("file://") else path
        if Path(path).is_dir() or ("*" in path and not Path(path).exists()):
            raise ImageError(
                path, "must be one file, or give a list of files: [*Path('photos').glob('*.jpg')]"
            )
        return path
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.size:
            if image.ndim == 2:
                return Image.fromarray(image.copy())
            if image.ndim == 3 and image.shape[2] == 3:
                return Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        given = f"of {image.dtype} {image.shape}"
        raise ImageError(
            f"array {given}", "must be uint8 of (H, W, 3) in BGR order, as OpenCV's, or (H, W)"
        )
    raise ImageError(
        f"{type(image).__name__}", "must be a path, a Pillow image, a NumPy array or a list of them"
    )


def load(
    path: str | Path,
    *,
    config: str | DictConfig | None = None,
    device: str | torch.device | None = None,
    optimize: bool = True,
) -> Predictor:
    """Load a trained model.

    Args:
        path: a training's output folder, whose best model is taken where it was kept, else the
            final or else the last one; or weights as `Predictor.from_config` takes them.
        config: name or file of the config, or itself; None: the config.yaml beside the weights.
        device, optimize: as `Predictor.from_config`.

    Raises:
        WeightsError, ConfigError: if weights or config do not exist, or do not fit each other.
    """
    weights = find_weights(path)
    cfg = config if isinstance(config, DictConfig) else get_config(config or find_config(weights))
    return Predictor.from_config(cfg, weights, device=device, optimize=optimize)


def find_weights(path: str | Path) -> str:
    """The file or address of the weights that `load` takes.

    Raises:
        WeightsError: if there are none.
    """
    return resolve_weights(str(_newest(Path(path)) if Path(path).is_dir() else path))


def find_config(weights: str) -> str:
    """The config.yaml beside weights.

    Raises:
        ConfigError: if there is none.
    """
    if "://" in weights:
        raise ConfigError(
            f"{weights} comes without a config: give the one that it was trained with, such as "
            "table2a_backbone/r50_fpn+zoo_fpn for COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
        )
    config = Path(weights).parent / "config.yaml"
    if not config.is_file():
        raise ConfigError(
            f"there is no {config}, which a training writes beside its weights: give the config "
            "that they were trained with. tools/convert_weights.py converts torchvision's weights"
        )
    return str(config)


def _newest(folder: Path) -> Path:
    tag = folder / "last_checkpoint"
    last = [tag.read_text(errors="replace").strip()] if tag.is_file() else []
    for name in ("model_best.pth", "model_final.pth", *last, "model_final.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"folder {folder} has no model_final.pth, model_best.pth or last_checkpoint, as a training "
        f"leaves them; it has {contents(folder)}"
    )
