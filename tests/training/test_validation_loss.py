import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from benchmark.cuda_rules import CudaRules
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.training.validation_loss import build_validation_loader, validation_losses
from train import do_train

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


def test_mean_over_the_images() -> None:
    """(1 + 3 + 7 + 1 + 3) / 5 images; batches are of unequal size."""
    losses = validation_losses(Model(), [[1.0, 3.0], [7.0, 1.0], [3.0]])
    assert losses["loss_a"] == pytest.approx(3.0)
    assert losses["total_loss"] == pytest.approx(losses["loss_a"] + losses["loss_b"])


def test_the_same_each_time_and_no_trace_in_batch_normalisation() -> None:
    model = Model()
    assert validation_losses(model, [[1.0, 3.0]]) == validation_losses(model, [[1.0, 3.0]])
    assert model.norm.training
    assert model.norm.num_batches_tracked == 0


def test_the_host_waits_for_the_device_once() -> None:
    class OnDevice(Model):
        def forward(self, batch: Any) -> dict[str, Tensor]:
            return {"loss_a": self.norm(batch).mean(), "loss_b": batch.mean()}

    with CudaRules() as cuda:
        model, batches = OnDevice().to("cuda"), [torch.ones(2, 1).to("cuda")] * 3
        with cuda.counted() as cost:
            losses = validation_losses(model, batches)
    assert (cost.waits.total(), cost.copies.total()) == (1, 0), cost.lines()
    assert losses["loss_b"] == 1


def test_the_precision_is_the_trainings() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: list[float]) -> dict[str, Tensor]:
            y = self.layer(torch.tensor(batch)[:, None])
            return {"loss_bits": torch.tensor(float(y.dtype.itemsize * 8)), "loss": y.mean()}

    bf16 = validation_losses(Linear(), [[1.0]], lambda: torch.autocast("cpu", torch.bfloat16))
    assert bf16["loss_bits"] == 16
    assert validation_losses(Linear(), [[1.0]])["loss_bits"] == 32


def test_a_training_goes_as_without_and_reports_them(toy_overrides: list[str]) -> None:
    """Same losses, with BatchNorm and drawn RoIs, as a training without validation."""
    metrics = []
    for period in (0, 1):
        overrides = [*toy_overrides, f"train.validation_period={period}", "train.log_period=1"]
        folder = f"{toy_overrides[-1]}_{period}"
        cfg = get_config(CONFIG, [*overrides, folder])
        setup_datasets(cfg)
        seed_all_rng(0)
        do_train(cfg)
        lines = (Path(cfg.train.output_dir) / "metrics.json").read_text().splitlines()
        metrics.append({m["iteration"]: m for m in map(json.loads, lines)})
    without, validated = metrics
    for iteration in (0, 1):
        assert validated[iteration]["total_loss"] == without[iteration]["total_loss"]
    assert "validation/loss_mask" in validated[0]
    assert "validation/loss_mask" not in without[0]


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
    assert sizes == {(64, 64)}  # as for testing: the training draws from 51 to 64
    with EventStorage():
        losses = validation_losses(model, loader)
    assert {"total_loss", "loss_mask", "loss_keypoint", "loss_rpn_cls"} <= losses.keys()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("mapper", [{"_target_": len}, len])
def test_a_mapper_without_augmentations_is_refused(
    split: str, mapper: Any, toy_overrides: list[str]
) -> None:
    cfg = get_config(CONFIG, [*toy_overrides, "train.validation_period=7"])
    setup_datasets(cfg)
    cfg.dataloader[split].mapper = mapper
    with pytest.raises(ConfigError, match=f"is 7, but dataloader.{split}.mapper has no argument"):
        build_validation_loader(cfg)


def test_a_test_set_without_annotations_is_refused(
    toy_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_config(CONFIG, [*toy_overrides, "train.validation_period=7"])
    cfg.dataset.test.names = ["unlabelled"]
    cfg.dataloader.test.dataset = {"_target_": lambda: [{"file_name": "a.jpg"}]}
    with pytest.raises(ConfigError, match=r"validation_period is 7.*\['unlabelled'\] has no ann"):
        build_validation_loader(cfg)
