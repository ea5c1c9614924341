"""The training's losses on the test set, which tell an overfitting training from a good one."""

import copy
from collections import Counter
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_test_loader
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mask_rcnn_plugin.config import ConfigError


def build_validation_loader(cfg: DictConfig) -> DataLoader:
    """The test set, image by image, with ground truth and the test's augmentations.

    Args:
        cfg: from `get_config`, its datasets set up by `setup_datasets`.

    Raises:
        ConfigError: if the test set has no annotations.
    """
    images = instantiate(cfg.dataloader.test.dataset)
    if not any("annotations" in image for image in images):
        raise ConfigError(
            f"train.validation_period is {cfg.train.validation_period}, but the test set "
            f"{list(cfg.dataset.test.names)} has no annotations to compute a loss with: set it to 0"
        )
    mapper = copy.deepcopy(cfg.dataloader.train.mapper)
    mapper.augmentations = cfg.dataloader.test.mapper.augmentations
    return build_detection_test_loader(
        images, mapper=instantiate(mapper), num_workers=cfg.dataloader.test.num_workers
    )


class ValidationLoss(HookBase):
    """Compute the losses on another set every so many iterations and after the last one.

    They are in the metrics as validation/total_loss, validation/loss_mask, ...: means over the
    images, in float32, always with the same sampled RoIs. Training is not affected: batch
    normalisation uses its running statistics and leaves them as they are, as it does random states.

    Args:
        period: in iterations.
        model: the one that is trained; may be wrapped for DDP.
        loader: yields batches with ground truth; each process its share of the images.
    """

    def __init__(self, period: int, model: nn.Module, loader: DataLoader) -> None:
        self._period = period
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._loader = loader

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self._period == 0 or iteration == self.trainer.max_iter:
            losses = self.compute()
            if comm.is_main_process():
                names = {f"validation/{name}": value for name, value in losses.items()}
                self.trainer.storage.put_scalars(**names, smoothing_hint=False)

    def compute(self) -> dict[str, float]:
        """Mean of each loss and of their sum over all images, on all ranks the same."""
        norms = [m for m in self._model.modules() if isinstance(m, _BatchNorm) and m.training]
        for norm in norms:
            norm.eval()
        sums: Counter[str] = Counter()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                for batch in self._loader:
                    for name, loss in self._model(batch).items():
                        sums[name] += loss.item() * len(batch)
                    sums["images"] += len(batch)
        finally:
            for norm in norms:
                norm.train()
        totals: Counter[str] = Counter()
        for part in comm.all_gather(dict(sums)):
            for name, value in part.items():
                totals[name] += value
        images: Any = totals.pop("images")
        losses = {name: value / images for name, value in totals.items()}
        return {"total_loss": sum(losses.values()), **losses}
