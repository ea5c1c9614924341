"""The training's losses on the test set, which show overfitting."""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mask_rcnn_plugin.config import ConfigError

logger = logging.getLogger(__name__)


def build_validation_loader(cfg: DictConfig) -> DataLoader:
    """The test set, image by image, with ground truth and the test's augmentations.

    Raises:
        ConfigError: if the test set has no annotations, or a mapper no augmentations to exchange.
    """
    refused = f"train.validation_period is {cfg.train.validation_period}, but"
    images = instantiate(cfg.dataloader.test.dataset) if cfg.dataset.test.names else []
    if not any("annotations" in image for image in images):
        raise ConfigError(
            f"{refused} the test set {list(cfg.dataset.test.names)} has no annotations: set the "
            "period to 0"
        )
    for key in ("dataloader.train.mapper", "dataloader.test.mapper"):
        if OmegaConf.select(cfg, f"{key}.augmentations") is None:
            raise ConfigError(
                f"{refused} {key} has no argument augmentations, which the validation needs to "
                "swap the training's for the test's: give it one, or set the period to 0"
            )
    mapper = copy.deepcopy(cfg.dataloader.train.mapper)
    mapper.augmentations = cfg.dataloader.test.mapper.augmentations
    return build_detection_test_loader(
        images, mapper=instantiate(mapper), num_workers=cfg.dataloader.test.num_workers
    )


def validation_losses(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Compute a model's losses on another set.

    Batch normalisation uses its running statistics and leaves them as they are; the same RoIs are
    sampled at each call. Random states are the caller's to keep.

    Args:
        model: in training mode; may be wrapped for DDP.
        loader: yields batches with ground truth; each process its share of the images.
        autocast: gives the precision of the forward pass.

    Returns:
        Means over all images, on all ranks the same: "total_loss", "loss_mask", ... All are NaN if
        the model has diverged, so that detectron2's RPN has no boxes.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    sums: dict[str, Any] = {}
    images = diverged = 0
    torch.manual_seed(0)
    try:
        with torch.no_grad(), EventStorage():  # what heads report is not of the training
            for batch in loader:
                images += len(batch)
                try:
                    with autocast():
                        losses = model(batch)
                except FloatingPointError:  # not raised: the other ranks go on
                    diverged += len(batch)
                    continue
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss.float() * len(batch)
    finally:
        for norm in norms:
            norm.train()
    # One transfer from the device, not one for each loss.
    values = torch.stack(list(sums.values())).tolist() if sums else []
    every = comm.all_gather((images, diverged, dict(zip(sums, values))))
    images, diverged = (sum(part[i] for part in every) for i in range(2))
    if diverged:
        logger.warning("The model has diverged: no boxes in %d of %d images", diverged, images)
    names = dict.fromkeys(name for *_, part in every for name in part)
    means = {
        name: math.nan if diverged else sum(part.get(name, 0.0) for *_, part in every) / images
        for name in names
    }
    return {"total_loss": math.nan if diverged else sum(means.values()), **means}
