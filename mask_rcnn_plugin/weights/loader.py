"""Weights read into a model."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torch.serialization import safe_globals

from mask_rcnn_plugin.errors import counted
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.weights.classes import NO_CLASS, class_names_of, keep_classes
from mask_rcnn_plugin.weights.files import (
    WeightsError,
    check_backbone,
    check_complete,
    check_weights,
    describe_fit,
    download,
    read_pkl,
    read_safetensors,
    unreadable,
)


class WeightsLoader(DetectionCheckpointer):
    """detectron2's checkpointer, for weights that may be damaged or come from others.

    What a training starts from may fit the model in part, as an ImageNet backbone does; what is
    used or resumed must cover all of it. No file can run code by being read.

    All processes call the methods alike, and the main process alone reads.

    Attributes:
        class_names: of the model's classes. Where they are given, a start takes the classes that a
            file knows by the same name, in whatever order; `load_strictly` leaves out those that
            stand for no class.
    """

    class_names: Sequence[str] = ()
    _strict = False
    _path = ""

    def load_strictly(self, path: str) -> None:
        """Load a model's weights for inference, from what `resolve_weights` takes.

        Raises:
            WeightsError: if the file cannot be read, or if a parameter of the model is missing from
                it or has another shape.
        """
        self._strict = True
        self._load_weights(path)

    def _load_weights(self, path: str) -> None:
        """The main process reads the file, the others get the model that it has then."""
        on_main_process(lambda: self._read_weights(path))
        if comm.get_world_size() > 1:
            for weight in self.model.state_dict().values():
                buffer = weight.contiguous()
                dist.broadcast(buffer, src=0)
                weight.copy_(buffer)

    def _read_weights(self, path: str) -> None:
        self._path = path
        try:
            self.load(download(path), checkpointables=[])
        except WeightsError:
            raise
        except Exception as error:  # whatever a file of something else comes up with
            raise WeightsError(f"weights {path} cannot be loaded: {error!r}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                content = read_pkl(filename)
            elif filename.endswith(".safetensors"):
                content = read_safetensors(filename)
            else:
                # Today's detectron2 reads the address's options, which these have none of.
                self._parsed_url_during_load = urlparse("")
                # torchvision's own trainings keep their arguments beside the weights.
                with safe_globals([argparse.Namespace]):
                    content = super()._load_file(filename)
                content["matching_heuristics"] = True  # only some versions of detectron2 set it
        except WeightsError:
            raise
        except Exception as error:  # whatever unpickling comes up with
            raise unreadable(filename, error) from error
        check_weights(filename, content)
        return content

    def _load_model(self, checkpoint: Any) -> Any:
        # fvcore calls it before it touches the optimizer.
        if self.class_names:
            self._keep_classes(checkpoint)
        details = logging.getLogger("detectron2.checkpoint.c2_model_loading")
        details.disabled = True  # it logs each weight, where one line says it all
        try:
            incompatible = super()._load_model(checkpoint)
        finally:
            details.disabled = False
        if self._strict:
            check_complete(self._path, incompatible)
        else:
            check_backbone(self._path, self.model, incompatible)
        return incompatible

    def _keep_classes(self, checkpoint: dict[str, Any]) -> None:
        weights, ours = checkpoint["model"], list(self.class_names)
        theirs = class_names_of(self._path, weights, checkpoint.get("metadata"))
        if not theirs or theirs == ours:
            return
        if self._strict and [name for name in theirs if name != NO_CLASS] != ours:
            return  # without the others, scores would be other ones
        kept = keep_classes(weights, self.model, theirs, ours)
        self.logger.info(
            f"{self._path}: {len(kept) or 'none'} of your {counted(len(ours), 'class', 'classes')} "
            + (f"known by name, with weights: {', '.join(kept)}" if kept else "known by name")
        )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.logger.info(describe_fit(self._path, self.model, incompatible))


def read_weights(path: str) -> dict[str, Tensor]:
    """The weights in a file by their names, as a `WeightsLoader` reads it.

    Raises:
        WeightsError: if it does not exist or cannot be read.
    """
    local = PathManager.get_local_path(download(path))
    content = WeightsLoader(nn.Module())._load_file(local)
    try:
        weights = {name: torch.as_tensor(value) for name, value in content["model"].items()}
    except Exception as error:  # of what is no array
        raise unreadable(path, error) from error
    if content.get("__author__") == "Caffe2":  # Detectron's names, which no other format keeps
        weights, _ = convert_c2_detectron_names(weights)
    return weights
