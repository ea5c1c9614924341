"""Pictures of a training as it goes, in its folder and in TensorBoard."""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mask_rcnn_plugin.data.coco import load
from mask_rcnn_plugin.data.metadata import metadata_of
from mask_rcnn_plugin.evaluation import PREDICTIONS_FILE
from mask_rcnn_plugin.evaluation.pictures import draw_inputs, draw_predictions
from mask_rcnn_plugin.training.random_states import random_states_kept

logger = logging.getLogger(__name__)

_COUNT = 4


class PictureHook(HookBase):
    """Draws the first batch, train_batch.jpg, and, when `draw_test` is called, a few images of the
    test set with their predictions, pictures/ITERATION/.

    The main process draws, of models with RoI heads. What cannot be drawn is a warning, never the
    end of a training.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._output = Path(cfg.train.output_dir)
        self._test_images: list[dict[str, Any]] = []

    def before_train(self) -> None:
        if not comm.is_main_process() or "roi_heads" not in self._cfg.model:
            return
        if self.trainer.start_iter == 0:
            self._handle = self.trainer.model.register_forward_pre_hook(self._draw_batch)

    def _draw_batch(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._handle.remove()
        file = self._output / "train_batch.jpg"
        try:
            with random_states_kept():  # the colours are drawn by chance
                picture = draw_inputs(args[0], metadata_of(self._cfg), self._cfg.model.input_format)
            cv2.imwrite(str(file), picture[:, :, ::-1])
            self._show("train_batch", picture)
        except Exception as error:  # of a model or mapper that is not like the plugin's own
            logger.warning("%s cannot be drawn: %r", file, error)

    def draw_test(self) -> None:
        """Draw some of the predictions that an evaluation has just written."""
        predictions = self._output / PREDICTIONS_FILE
        tasks = OmegaConf.select(self._cfg, "dataloader.evaluator.tasks") or ()
        if not comm.is_main_process() or "box_proposals" in tasks or not predictions.is_file():
            return
        folder = self._output / "pictures" / f"{min(self.trainer.iter + 1, self.trainer.max_iter)}"
        (name,) = self._cfg.dataset.test.names
        try:
            self._test_images = self._test_images or load(name)[:_COUNT]
            with random_states_kept():
                files = draw_predictions(
                    self._test_images, MetadataCatalog.get(name), predictions, folder, _COUNT
                )
            for i, file in enumerate(files):
                self._show(f"test/{i}", np.asarray(cv2.imread(str(file)))[:, :, ::-1])
        except Exception as error:
            logger.warning("pictures in %s cannot be drawn: %r", folder, error)

    def _show(self, name: str, picture: np.ndarray) -> None:
        if "tensorboard" not in self._cfg.train.get("loggers", ["tensorboard"]):
            return  # the only one that takes pictures, and lets go of them
        self.trainer.storage.put_image(name, torch.from_numpy(picture.copy()).permute(2, 0, 1))
