from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

import train
from mask_rcnn_plugin.training.guarded_trainer import GuardedTrainer
from mask_rcnn_plugin.training.weight_average import WeightAverage
from mask_rcnn_plugin.weights import WeightsLoader
from train import do_train

EMA = ("train.ema.enabled=True", "train.ema.decay=0.6")
NORMS = ("model.backbone.norm=BN", "model.backbone.freeze_at=0")


class Model(nn.Module):
    """One weight w, loss w * x, and a running mean of x: steps and averages are simple sums."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.BatchNorm1d(1, momentum=0.5)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        x = torch.tensor([[image["x"]] for image in batch])
        self.norm(x)
        return {"loss": self.weight * x.mean()}


def batch(x: float) -> list[dict[str, Any]]:
    return [{"file_name": "", "x": x}, {"file_name": "", "x": x}]


class NaNModel(Model):
    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        if batch[0]["x"] == 0:
            return {"loss": self.weight * float("nan")}
        return super().forward(batch)


def trained(
    model: Model, inputs: list[float], decay: float, **settings: Any
) -> tuple[nn.Module, int]:
    """The average, and how many steps are in it."""
    batches = [batch(x) for x in inputs]
    average = WeightAverage(model, decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = GuardedTrainer(model, batches, optimizer, **settings)
    trainer.register_hooks([average])
    trainer.train(0, len(batches))
    return average.model, average.state_dict()["steps"]


def test_it_is_the_average_of_the_hand_calculation() -> None:
    model = Model()
    average, _ = trained(model, [1.0, 2.0, 4.0], decay=0.2)
    # Decays are 2 / 11, then at most 0.2; weights 1, 0.9, 0.7, 0.3; means 0, 0.5, 1.25, 2.625.
    weight = 2 / 11 * 1 + 9 / 11 * 0.9
    mean = 9 / 11 * 0.5
    for trained_weight, trained_mean in ((0.7, 1.25), (0.3, 2.625)):
        weight = 0.2 * weight + 0.8 * trained_weight
        mean = 0.2 * mean + 0.8 * trained_mean
    assert average.weight.item() == pytest.approx(weight)
    assert average.norm.running_mean.item() == pytest.approx(mean)
    assert model.weight.item() == pytest.approx(0.3)


def test_steps_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    whole, steps = trained(Model(), [1.0, 2.0], decay=0.5)
    left_out = {"max_skipped_steps": 1, "output_dir": str(tmp_path)}
    average, same_steps = trained(NaNModel(), [1.0, 0.0, 2.0], decay=0.5, **left_out)
    assert steps == same_steps == 3
    assert_equal(average.state_dict(), whole.state_dict())


def final(cfg: DictConfig) -> dict[str, Any]:
    return torch.load(Path(cfg.train.output_dir) / "model_final.pth", weights_only=True)


def raw(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return checkpoint["trainer"]["hooks"]["WeightAverage"]["model"]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_resume_is_equal_to_the_bit(build: Any, score: Any, interrupt: Any) -> None:
    score(*[1.0] * 9)
    settings = (*EMA, *NORMS, "train.max_iter=5", "train.checkpointer.period=2")
    whole = build("whole", *settings)
    do_train(whole)
    with pytest.raises(KeyboardInterrupt):
        do_train(build("halves", *settings), extra_hooks=[interrupt(2)])
    halves = build("halves", *settings)
    torch.manual_seed(77)
    do_train(halves, resume=True)
    one, other = final(whole), final(halves)
    assert_equal(one["model"], other["model"])
    assert_equal(raw(one), raw(other))
    without = build("without", *settings, "train.ema.enabled=False")
    do_train(without)
    assert_equal(raw(one), final(without)["model"])  # it changes nothing of the training
    mean = "backbone.res4.0.conv1.norm.running_mean"
    for name in ("proposal_generator.rpn_head.conv.weight", mean):
        assert not torch.equal(one["model"][name], raw(one)[name])


def test_the_average_is_evaluated_and_what_inference_loads(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluate(_: DictConfig, model: nn.Module) -> dict[str, Any]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"segm": {"AP": 1.0}}

    monkeypatch.setattr(train, "do_test", evaluate)
    cfg = build("out", *EMA, "train.best_metric=segm/AP", "train.validation_period=2")
    do_train(cfg)
    assert_equal(seen[-1], final(cfg)["model"])
    readers: list[Callable[[nn.Module, str], object]] = [
        lambda model, file: WeightsLoader(model).load_strictly(file),
        lambda model, file: DetectionCheckpointer(model).load(file),
    ]
    for read in readers:
        for name in ("model_best.pth", "model_final.pth"):
            model = instantiate(cfg.model)
            read(model, str(Path(cfg.train.output_dir) / name))
            assert_equal(model.state_dict(), seen[-1])


def test_it_starts_from_the_weights_that_are_loaded(build: Any, score: Any) -> None:
    """And from those of a training that had none before."""
    score(1.0, 1.0, 1.0)
    start = build("start", "train.max_iter=1")
    do_train(start)
    weights = parameters(final(start)["model"])
    file = Path(start.train.output_dir) / "model_final.pth"
    still = (*EMA, "optimizer.lr=0", "train.max_iter=2", f"train.init_checkpoint={file}")
    for folder, resume in (("out", False), ("start", True)):
        cfg = build(folder, *still)
        do_train(cfg, resume=resume)
        checkpoint = final(cfg)
        assert checkpoint["iteration"] == 1
        assert_equal(parameters(checkpoint["model"]), weights)
        assert_equal(parameters(raw(checkpoint)), weights)


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without running statistics, which change at any learning rate."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in state.items() if not name.endswith(statistics)}
