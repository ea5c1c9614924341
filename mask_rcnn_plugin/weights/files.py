"""Weights that a user names: where they are, what is in the file, and how it fits a model."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.weights import safe_pickle
from mask_rcnn_plugin.weights.classes import config_beside

_SUFFIXES = (".pth", ".pkl", ".pyth", ".safetensors")
# ImageNet weights fill all but an FPN's layers, and what a user has added; those of another network
# or library much less.
_LEAST_OF_BACKBONE = 0.6
# How torchvision's names of weights start, in ResNets and detectors.
_TORCHVISION = ("layer1.0.", "backbone.body.")
# What batch norm takes for granted where a file lacks it.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class WeightsError(UserError):
    """Weights that do not exist, cannot be read or do not fit the model; the message says which."""


def resolve_weights(weights: str) -> str:
    """The path or address of what a user's `--weights` or `train.init_checkpoint` names.

    Args:
        weights: a file; an address that detectron2 resolves (detectron2://..., catalog://...,
            https://...) or timm (timm://...); or a model-zoo name such as
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", where detectron2 has its model_zoo.

    Raises:
        WeightsError: if there is no such file or zoo model, or if it is a folder.
    """
    path = Path(weights)
    if "://" in weights or path.is_file():
        return weights
    if path.is_dir():
        raise WeightsError(
            f"weights {weights!r} is a folder, must be a file; it has {contents(path)}"
        )
    if weights.startswith(("COCO-", "LVIS", "Cityscapes/", "PascalVOC-", "Misc/")):
        try:
            from detectron2 import model_zoo

            return model_zoo.get_checkpoint_url(weights.removesuffix(".yaml") + ".yaml")
        except (ImportError, RuntimeError) as error:
            raise WeightsError(
                f"weights {weights!r} are not found in detectron2.model_zoo ({error}): give the "
                "downloaded file or a detectron2:// address"
            ) from error
    there = f"has {contents(path.parent)}" if path.parent.is_dir() else "does not exist either"
    raise WeightsError(f"weights file {weights!r} does not exist; {path.parent} {there}")


def download(weights: str) -> str:
    """`resolve_weights`, what is behind an address being in detectron2's cache then; "" is "".

    Raises:
        WeightsError: also if it cannot be downloaded.
    """
    address = resolve_weights(weights) if weights else ""
    try:
        if "://" in address:  # its options are detectron2's, for what the loader does anyway
            address = urlparse(address)._replace(query="").geturl()
            PathManager.get_local_path(address)
    except UserError:  # there is nothing to download
        raise
    except Exception as error:  # of any of iopath's handlers
        raise WeightsError(
            f"cannot download {address} ({getattr(error, 'reason', error)}). Without internet, "
            "download it elsewhere and give the file: train.init_checkpoint=FILE, or --weights FILE"
        ) from error
    return address


def contents(folder: Path) -> str:
    """The weights and folders in a folder, in words."""
    files = sorted(f.name for f in folder.iterdir() if f.suffix in _SUFFIXES)
    folders = sorted(f"{f.name}/" for f in folder.iterdir() if f.is_dir())
    there = _some(files, 10) or f"no file of {', '.join(_SUFFIXES)}"
    return there + (f"; folders {_some(folders, 10)}" if folders else "")


def read_pkl(filename: str) -> dict[str, Any]:
    """Read weights of detectron2, Detectron, Caffe2 or MSRA, told apart as detectron2 does."""
    with PathManager.open(filename, "rb") as file:
        data = safe_pickle.load(file)
    if "model" in data and "__author__" in data:
        return data
    weights = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def read_safetensors(filename: str) -> dict[str, Any]:
    """Read weights and, as "metadata", names of classes and keypoints, which are not trusted.

    Raises:
        WeightsError: if safetensors is not installed.
    """
    with _safetensors(filename).safe_open(filename, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads((file.metadata() or {}).get("dataset.metadata", "{}"))
    return {"model": weights, "metadata": metadata, "matching_heuristics": True}


def save_safetensors(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write what `read_safetensors` reads.

    Raises:
        WeightsError: if safetensors is not installed.
        OSError: if the file cannot be written.
    """
    save = _safetensors(str(path)).torch.save
    # No two may share memory.
    apart = {k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    with atomic_write(path) as file:
        file.write(save(apart, {"format": "pt", "dataset.metadata": json.dumps(metadata)}))


def _safetensors(path: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise WeightsError(f"{path} needs safetensors: pip install safetensors") from error
    return safetensors


def check_weights(path: str, content: dict[str, Any]) -> None:
    """Raise a WeightsError if a file's "model" is anything else than named weights."""
    weights = content["model"]
    if isinstance(weights, dict):
        if weights and not any(isinstance(value, dict) for value in weights.values()):
            return
        what = f"has {_some(map(repr, weights)) or 'nothing'}"
    else:
        what = f"is a {type(weights).__name__}"
    raise WeightsError(
        f"weights {path} cannot be loaded: the file {what}, must be a dict of weights by name, or "
        "have one under the key 'model'"
    )


def unreadable(path: str | Path, error: Exception) -> WeightsError:
    """What to raise where a file cannot be unpickled."""
    # torch's message is a page of advice to trust the file.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    what = f"it is empty, damaged or not a checkpoint ({type(error).__name__} {reason})"
    if unsafe := re.search(r"(?:GLOBAL|it asks for) ([^\s,]+)", str(error)):
        what = f"it asks for {unsafe[1]}, which weights never need; it was not run"
    return WeightsError(f"weights {path} cannot be loaded: {what}")


def check_complete(path: str, incompatible: Any) -> None:
    """Raise a WeightsError if the file lacks a weight of the model, or has it in another shape."""
    if lost := _some(_lost(incompatible).values()):
        what = _conversion(path, incompatible) or lost
        raise WeightsError(f"weights {path} do not fit the model of this config: {what}")


def check_backbone(path: str, model: nn.Module, incompatible: Any) -> None:
    """Raise a WeightsError if the model has a backbone, and the file too little of its weights."""
    backbone = {k for k in _weights(model) if re.match(r"backbone\.(?!fpn_|top_block)", k)}
    found = len(backbone - _lost(incompatible).keys())
    if backbone and found < _LEAST_OF_BACKBONE * len(backbone):
        trained_as = (config_beside(path).get("source") or {}).get("config")
        hint = f"the file has {_some(incompatible.unexpected_keys)}"
        hint = _conversion(path, incompatible) or hint
        if trained_as:
            hint = f"they were trained as {trained_as}, whose backbone is not this config's: "
            hint += "use that config, or other weights"
        raise WeightsError(
            f"weights {path} have {found} of the {len(backbone)} weights of the backbone, and the "
            f"others would start at random; {hint}"
        )


def describe_fit(path: str, model: nn.Module, incompatible: Any) -> str:
    """Say in one line what of a model starts anew, as the file does not have it."""
    lost, weights = _lost(incompatible), _weights(model)
    line = f"{path}: {len(weights - lost.keys())} of {len(weights)} weights are loaded"
    if lost:
        # Layers that the file lacks altogether are many: an FPN, all heads.
        shapes = {key for key, *_ in incompatible.incorrect_shapes}
        anew = [lost[k] if k in shapes else ".".join(k.split(".")[:2]) for k in lost]
        line += f"; newly initialized: {_some(dict.fromkeys(anew))}"
    unused = [k for k in incompatible.unexpected_keys if not k.endswith("num_batches_tracked")]
    if unused:
        line += f"; in the file, but not in the model: {_some(unused)}"
    return line


def _conversion(path: str, incompatible: Any) -> str:
    """What to say of weights that torchvision names so; "" of others."""
    if not any(key.startswith(_TORCHVISION) for key in incompatible.unexpected_keys):
        return ""
    command = f"python tools/convert_weights.py --from torchvision {path} NEW_FILE"
    return f"they are torchvision's, which {command} converts"


def _weights(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if not key.endswith(_STATISTICS)}


def _lost(incompatible: Any) -> dict[str, str]:
    """The model's weights that a file does not give, and why."""
    lost = {key: f"{key} is missing" for key in incompatible.missing_keys}
    for key, there, here in sorted(incompatible.incorrect_shapes):
        lost[key] = f"{key} is {list(there)} in the file, {list(here)} in the model"
    return lost


def _some(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
