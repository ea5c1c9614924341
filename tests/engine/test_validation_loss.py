from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.engine import setup_datasets
from mask_rcnn_plugin.engine.validation_loss import ValidationLoss, build_validation_loader

CONFIG = "table4_keypoints/keypoint_and_mask+synthetic"


class Model(nn.Module):
    """Its losses are what is in the batch, plus a random number that the caller may fix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch: list[float]) -> dict[str, Tensor]:
        assert self.training
        values = torch.tensor(batch)
        self.norm(values[:, None])
        return {"loss_a": values.mean(), "loss_b": torch.rand(())}


class Iterations(TrainerBase):
    def run_step(self) -> None:
        torch.rand(())


def run(max_iter: int, period: int) -> dict[int, float]:
    hook = ValidationLoss(period, Model(), [[1.0, 3.0], [7.0, 1.0], [3.0]])
    trainer = Iterations()
    trainer.register_hooks([hook])
    trainer.train(0, max_iter)
    history = trainer.storage.history("validation/loss_a").values()
    return {iteration: value for value, iteration in history}


def test_mean_over_the_images() -> None:
    """(1 + 3 + 7 + 1 + 3) / 5 images; batches are of unequal size."""
    assert run(4, 2) == {1: 3.0, 3: 3.0}
    assert run(5, 2) == {1: 3.0, 3: 3.0, 4: 3.0}


def test_the_training_is_not_affected() -> None:
    model = Model()
    hook = ValidationLoss(1, model, [[1.0, 3.0]])
    torch.manual_seed(5)
    first = hook.compute()
    drawn = torch.rand(())
    assert first == hook.compute()
    assert first["total_loss"] == pytest.approx(first["loss_a"] + first["loss_b"])
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))
    assert model.norm.training
    assert model.norm.num_batches_tracked == 0


def test_losses_of_the_test_set(toy_overrides: list[str]) -> None:
    cfg = get_config(CONFIG, [*toy_overrides, "train.validation_period=1"])
    setup_datasets(cfg)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    loader = build_validation_loader(cfg)
    seen: list[dict[str, Any]] = [batch[0] for batch in loader]
    people = [i for i in seen if len(i["instances"])]
    assert "/val/" in people[0]["file_name"]
    assert people[0]["instances"].has("gt_masks")
    assert people[0]["instances"].has("gt_keypoints")
    sizes = {tuple(i["image"].shape[1:]) for i in seen}
    assert sizes == {(128, 128)}  # as for testing: the training draws from 102 to 128
    with EventStorage():
        losses = ValidationLoss(1, model, loader).compute()
    assert {"total_loss", "loss_mask", "loss_keypoint", "loss_rpn_cls"} <= losses.keys()


def test_a_test_set_without_annotations_is_refused(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_config(CONFIG, [*toy_overrides, "train.validation_period=7"])
    cfg.dataset.test.names = ["unlabelled"]
    cfg.dataloader.test.dataset = {"_target_": lambda: [{"file_name": "a.jpg"}]}
    with pytest.raises(ConfigError, match=r"validation_period is 7.*\['unlabelled'\] has no ann"):
        build_validation_loader(cfg)
