"""Scales a schedule to another batch size than it was made for, and to a dataset's size."""

import math

from detectron2.config import instantiate
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.training.setup import images_left

# Milestones are parts of train.max_iter, as is a warm-up given as such, and go along.
_ITERATIONS = (
    "train.max_iter",
    "train.eval_period",
    "train.validation_period",
    "train.checkpointer.period",
    "lr_multiplier.warmup_length.iterations",
)


def fit_batch(cfg: DictConfig) -> None:
    """Check that the processes can share the batch, and scale the schedule to it, in place.

    The main process prints what is changed.

    Raises:
        ConfigError: if the batch cannot be divided among the processes; see `scale_to_batch`.
    """
    batch, processes = cfg.dataloader.train.total_batch_size, comm.get_world_size()
    if batch % processes:
        raise ConfigError(
            f"dataloader.train.total_batch_size is {batch}, must be a multiple of {processes}, the "
            "number of processes"
        )
    changes = scale_to_batch(cfg)
    if changes and comm.is_main_process():
        print(f"scaled to a batch of {cfg.train.reference_batch_size}: {'; '.join(changes)}")


def scale_to_batch(cfg: DictConfig) -> list[str]:
    """Scale the schedule from `train.reference_batch_size` to the batch of an iteration, in place.

    That batch is `dataloader.train.total_batch_size` x `train.accumulate_steps`. The learning rate
    is multiplied by batch / reference; iterations, warm-up and periods by reference / batch,
    rounded. Interpolations stay, as does 0, which switches a period off.
    `train.reference_batch_size` becomes the batch.

    Returns:
        What was changed, "key old -> new" each; [] without a reference.

    Raises:
        ConfigError: if there is no `optimizer.lr` to scale.
    """
    reference = cfg.train.reference_batch_size
    if reference is None:
        return []
    batch = cfg.dataloader.train.total_batch_size * cfg.train.accumulate_steps
    if "lr" not in cfg.optimizer:
        raise ConfigError("train.reference_batch_size needs an optimizer.lr to scale")
    changes = _change(cfg, "optimizer.lr", cfg.optimizer.lr * batch / reference)
    for key in _ITERATIONS:
        node, _, name = key.rpartition(".")
        old = OmegaConf.select(cfg, key)
        if old and not OmegaConf.is_interpolation(OmegaConf.select(cfg, node), name):
            changes += _change(cfg, key, max(1, round(old * reference / batch)))
    cfg.train.reference_batch_size = batch
    return changes


def _change(cfg: DictConfig, key: str, new: float) -> list[str]:
    old = OmegaConf.select(cfg, key)
    OmegaConf.update(cfg, key, new)
    return [f"{key} {old:g} -> {new:g}"] if new != old else []


def fit_epochs(cfg: DictConfig) -> None:
    """Turn `train.epochs`, where it is set, into iterations, in place: the training's length, an
    evaluation and a checkpoint each epoch, and a warm-up no longer than one.

    The main process counts the images for all, and prints what is replaced, in the config or an
    override. Every process calls this.

    Args:
        cfg: its datasets set up by `setup_datasets`, its batch fitted by `fit_batch`.

    Raises:
        DatasetError: if the training set has no image to train on.
    """
    epochs = cfg.train.get("epochs")
    if epochs is None:
        return

    def count() -> int:
        with images_left(cfg):
            return len(instantiate(cfg.dataloader.train.dataset))

    images = on_main_process(count)
    batch = cfg.dataloader.train.total_batch_size * cfg.train.accumulate_steps
    epoch = max(1, math.ceil(images / batch))
    # The length comes last, as a period may refer to it.
    changes = _change(cfg, "train.eval_period", epoch)
    changes += _change(cfg, "train.checkpointer.period", epoch)
    changes += _change(cfg, "train.max_iter", max(1, math.ceil(epochs * images / batch)))
    warmup = OmegaConf.select(cfg, "lr_multiplier.warmup_length")
    if isinstance(warmup, DictConfig) and "iterations" in warmup:
        key = "lr_multiplier.warmup_length.iterations"
        changes += _change(cfg, key, min(warmup.iterations, epoch))
    if comm.is_main_process():
        what = "an evaluation" if cfg.dataset.test.names else "a checkpoint"
        print(
            f"{epochs:g} epochs of {images} images, {batch} an iteration: {cfg.train.max_iter} "
            f"iterations, {what} every {epoch}" + "".join(f"; {c}" for c in changes)
        )
