import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mask_rcnn_plugin  # noqa: F401  first, as a spawned process imports nothing before

# isort: split
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmark.cuda_rules import CudaRules
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training.guarded_trainer import GuardedTrainer, build_trainer
from mask_rcnn_plugin.training.nonfinite import NonFiniteLossError, read_batch
from mask_rcnn_plugin.training.random_states import set_random_state
from mask_rcnn_plugin.training.weight_average import WeightAverage


class Model(nn.Module):
    """Mean squared output over a batch of {"image": (2,)}; draws a random number a call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.seen: list[torch.dtype] = []
        self.drawn: list[float] = []

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        y = self.layer(torch.stack([image["image"] for image in batch]))
        self.seen.append(y.dtype)
        self.drawn.append(torch.rand(()).item())
        losses = y.float().square().mean(dim=1)
        return {"loss_a": losses.mean(), "loss_b": 2 * losses.mean()}


def image(value: float, **more: Any) -> dict[str, Any]:
    return {"file_name": f"{value}.jpg", "image": torch.tensor([value, 1.0]), **more}


def trainer(
    tmp_path: Path,
    batches: Iterable[Any],
    model: nn.Module | None = None,
    amp: dict[str, Any] | None = None,
    batch_size: int = 1,
    lr: float = 0.1,
    **train: Any,
) -> GuardedTrainer:
    cfg = OmegaConf.create(
        {
            "train": {
                "amp": amp or {"enabled": False, "dtype": "bf16"},
                "device": "cpu",
                "accumulate_steps": 1,
                "max_skipped_steps": 0,
                "output_dir": str(tmp_path),
                "reference_batch_size": None,
                **train,
            },
            "dataloader": {"train": {"total_batch_size": batch_size}},
        }
    )
    model = model or Model()
    return build_trainer(cfg, model, batches, torch.optim.SGD(model.parameters(), lr=lr))


def test_a_step_is_detectron2s(tmp_path: Path) -> None:
    """Losses, and weights after plain SGD computed by hand."""
    built = trainer(tmp_path, [[image(1.0), image(2.0)]])
    expected = Model()
    total = sum(expected([image(1.0), image(2.0)]).values())
    total.backward()
    built.train(0, 1)
    for ours, theirs in zip(built.model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)
    latest = {name: value for name, (value, _) in built.storage.latest().items()}
    assert latest["total_loss"] == pytest.approx(total.item())
    assert latest["loss_b"] == pytest.approx(total.item() * 2 / 3)
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm().item()
    assert latest["grad_norm"] == pytest.approx(norm)


def test_accumulated_steps_equal_the_large_batch(tmp_path: Path) -> None:
    class Steps(HookBase):
        calls = 0

        def after_step(self) -> None:
            self.calls += 1

    images = [image(float(i)) for i in range(16)]
    large = trainer(tmp_path, [images[:8], images[8:]])
    large.train(0, 2)
    small = trainer(tmp_path, [images[i : i + 2] for i in range(0, 16, 2)], accumulate_steps=4)
    hook = Steps()
    small.register_hooks([hook])
    small.train(0, 2)
    assert hook.calls == 2
    for a, b in zip(small.model.parameters(), large.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for name in ("total_loss", "loss_a", "grad_norm"):
        mean = small.storage.latest()[name][0]
        assert mean == pytest.approx(large.storage.latest()[name][0], rel=1e-6)


def test_a_resume_takes_the_configs_rate(tmp_path: Path) -> None:
    batch = [image(1.0)]
    before = trainer(tmp_path, [batch] * 2)
    before.optimizer.param_groups[0]["initial_lr"] = 0.1  # as the schedule keeps it
    resumed = trainer(tmp_path, [batch] * 2, lr=0.4)
    resumed.load_state_dict(before.state_dict())
    schedule = LRMultiplier(resumed.optimizer, ConstantParamScheduler(1.0), 9, last_iter=3)
    assert schedule.get_last_lr() == [0.4]


@pytest.mark.parametrize(
    ("length", "iterations", "said"),
    [
        ({"reference_batch_size": 16}, 19, "40 iterations done count as 20"),
        ({"epochs": 3}, 19, "40 iterations done count as 20"),
        ({}, 39, "40 iterations done count as 40"),
    ],
)
def test_a_resume_with_another_batch_is_counted_in_its_steps(
    tmp_path: Path,
    length: dict[str, Any],
    iterations: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = trainer(tmp_path, [], batch_size=4, accumulate_steps=2)
    before.iter = 39
    now = trainer(tmp_path, [], batch_size=16, **length)
    now.load_state_dict(before.state_dict())
    assert now.iter == iterations
    assert said in caplog.text


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_host_waits_for_the_device_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """With another process the host's own numbers are copied there, which it does not wait for."""
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    monkeypatch.setattr(comm, "all_gather", lambda x: [x] * world_size)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda rows: rows[1:].copy_(rows[:1]))
    with CudaRules() as cuda:
        model = Model().to("cuda")
        batches = [[image(v, image=torch.tensor([v, 1.0]).to("cuda"))] for v in (1.0, 2.0)]
        bad = [image(1.0, image=torch.full((2,), math.nan, device="cuda"))]
        batches = [*batches * 2, batches[0], bad]
        built = trainer(tmp_path, batches, model, accumulate_steps=2, max_skipped_steps=1)
        built.train(0, 1)  # the names of the losses are agreed on in the first step
        with cuda.counted() as cost:
            built.train(1, 2)
        assert (cost.waits.total(), cost.copies.total()) == (1, world_size - 1), cost.lines()
        built.train(2, 3)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 1
    assert built.model.layer.weight.isfinite().all()


def test_hooks_between_gradient_and_step_are_called(tmp_path: Path) -> None:
    """As detectron2's main does, e.g. for clipping; its 0.6 has none."""
    built = trainer(tmp_path, [[image(1.0)]])
    built.after_backward = lambda: built.model.zero_grad()
    before = built.model.layer.weight.clone()
    built.train(0, 1)
    assert torch.equal(built.model.layer.weight, before)
    assert built.storage.latest()["grad_norm"][0] == 0


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path: Path) -> None:
    built = trainer(tmp_path, [[image(1.0)]], amp={"enabled": True, "dtype": "bf16"})
    before = built.model.layer.weight.clone()
    built.train(0, 1)
    assert built.model.seen == [torch.bfloat16]
    assert built.model.layer.weight.dtype == torch.float32
    assert not torch.equal(built.model.layer.weight, before)


@pytest.mark.cuda  # float16 needs a GPU
def test_fp16_scales_the_loss_and_keeps_the_scale(tmp_path: Path) -> None:
    model = Model().cuda()
    batch = [{**image(1.0), "image": torch.ones(2, device="cuda")}]
    amp = {"enabled": True, "dtype": "fp16"}
    built = trainer(tmp_path, [batch] * 2, model, amp, device="cuda")
    built.train(0, 1)
    assert model.seen == [torch.float16]
    assert built.state_dict()["grad_scaler"]["scale"] > 1


def test_non_finite_loss_stops_before_the_step_and_names_what_broke(tmp_path: Path) -> None:
    built = trainer(tmp_path, [[image(1.0)], [image(2.0), image(float("nan"))]])
    weights: list[Tensor] = []

    class Keep(HookBase):
        def after_step(self) -> None:
            weights.append(built.model.layer.weight.detach().clone())

    built.register_hooks([Keep()])
    with pytest.raises(NonFiniteLossError) as error:
        built.train(0, 2)
    message = str(error.value)
    assert "iteration 1: rank 0: loss_a, loss_b of ['2.0.jpg', 'nan.jpg']" in message
    file = tmp_path / "nonfinite" / "iteration_0000001_rank0_0.pth"
    assert str(file) in message
    assert "learning rate at this iteration is 0.1" in message
    assert torch.equal(built.model.layer.weight, weights[0])


def test_only_the_batch_that_broke_is_written(tmp_path: Path) -> None:
    batches = [[image(1.0)], [image(float("inf"))], [image(2.0)]]
    with pytest.raises(NonFiniteLossError, match=r"of \['inf\.jpg'\]"):
        trainer(tmp_path, batches, accumulate_steps=3).train(0, 1)
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert [i["file_name"] for i in read_batch(str(file))["batch"]] == ["inf.jpg"]


class BrokenGradient(Model):
    """A finite loss with an infinite gradient: the square root at 0."""

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        super().forward(batch)
        return {"loss": (self.layer.weight.sum() * 0).sqrt()}


def test_a_resume_with_an_optimizer_of_another_type_is_refused(tmp_path: Path) -> None:
    before, now = (trainer(tmp_path, []) for _ in range(2))
    now.optimizer = torch.optim.AdamW(now.model.parameters())
    with pytest.raises(ConfigError, match="SGD.*AdamW"):
        now.load_state_dict(before.state_dict())


def test_a_resume_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = Model()
    before, now = (trainer(tmp_path, [], model) for _ in range(2))
    now.optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(ConfigError, match="optimizer does not fit.* groups"):
        now.load_state_dict(before.state_dict())


def test_a_gradient_alone_is_noticed(tmp_path: Path) -> None:
    built = trainer(tmp_path, [[image(1.0)]], BrokenGradient())
    with pytest.raises(NonFiniteLossError, match=r"rank 0: gradient of \['1\.0\.jpg'\]"):
        built.train(0, 1)
    assert built.model.layer.weight.isfinite().all()
    assert len(list((tmp_path / "nonfinite").iterdir())) == 1


def test_float16_without_a_scale_that_fits_is_an_error(tmp_path: Path) -> None:
    """The scale begins at 2^16 and is halved at each of these."""
    model = BrokenGradient()
    batches = [[image(1.0)]] * 20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    built = GuardedTrainer(model, batches, optimizer, dtype=torch.float16, output_dir=str(tmp_path))
    with pytest.raises(NonFiniteLossError, match="overflow in float16 at iteration 16"):
        built.train(0, 20)
    assert model.layer.weight.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_no_step_is_taken_where_float16_overflows(fused: bool, tmp_path: Path) -> None:
    """Momentum included, which a fused optimizer would set to whatever is in its memory."""
    model = Model()
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    batches = [[image(1.0)], [image(1.0)]]
    built = GuardedTrainer(model, batches, optimizer, dtype=torch.float16, output_dir=str(tmp_path))
    built.register_hooks([average := WeightAverage(model, 0.5)])
    built._scaler.load_state_dict({**built._scaler.state_dict(), "scale": 2.0**127})
    garbage = [torch.full_like(before, 7.0) for _ in range(100)]
    del garbage
    built.train(0, 1)
    assert torch.equal(model.layer.weight, before)
    assert not optimizer.state
    assert "grad_norm" not in built.storage.latest()
    assert average.state_dict()["steps"] == 1  # the start
    built._scaler.load_state_dict({**built._scaler.state_dict(), "scale": 1.0})
    built.train(1, 2)
    torch.testing.assert_close(before - model.layer.weight, 0.1 * model.layer.weight.grad)
    assert built.storage.latest()["grad_norm"][0] > 0


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_resume_may_have_another_layout_and_a_fused_optimizer(kind: str, tmp_path: Path) -> None:
    """As on a GPU after a CPU, or the reverse."""

    def build(layout: torch.memory_format, fused: bool) -> GuardedTrainer:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, fused=fused, **options)
        return GuardedTrainer(model, [], optimizer, output_dir=str(tmp_path))

    def step(built: GuardedTrainer) -> None:
        for p in built.model.parameters():
            p.grad = torch.empty_like(p).copy_(torch.arange(p.numel()).view(p.shape) / p.numel())
        built.optimizer.step()

    unbroken, before = (build(torch.contiguous_format, False) for _ in range(2))
    for built in (unbroken, unbroken, before):
        step(built)
    for layout in (torch.channels_last, torch.contiguous_format):
        for fused in (True, False):
            resumed = build(layout, fused)
            resumed.load_state_dict(copy.deepcopy(before.state_dict()))
            resumed.model.load_state_dict(before.model.state_dict())
            step(resumed)
            for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters()):
                torch.testing.assert_close(ours, theirs)
                state = resumed.optimizer.state[ours]
                assert all(
                    v.stride() == ours.stride() for v in state.values() if v.shape == ours.shape
                )


def test_a_resume_with_a_fused_optimizer_counts_steps_on_the_device(tmp_path: Path) -> None:
    before, now = (nn.Linear(2, 2, device="meta") for _ in range(2))
    plain = torch.optim.AdamW(before.parameters())
    for p in before.parameters():
        p.grad = torch.zeros_like(p)
    plain.step()
    fused = torch.optim.AdamW(now.parameters())
    fused.param_groups[0]["fused"] = True  # its constructor asks for a device that there is
    resumed = GuardedTrainer(now, [], fused, output_dir=str(tmp_path))
    resumed.load_state_dict(GuardedTrainer(before, [], plain).state_dict())
    assert {s["step"].device.type for s in fused.state.values()} == {"meta"}


class DivergedProposals(Model):
    """As detectron2's RPN in training, whose boxes are not finite any more."""

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        if any(i["image"].isnan().any() for i in batch):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return super().forward(batch)


def test_an_error_of_the_rpn_is_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    batches = [[image(1.0)], [image(float("nan"))]]
    built = trainer(tmp_path, batches, DivergedProposals(), accumulate_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"rank 0: forward pass of \['nan\.jpg'\]"):
        built.train(0, 1)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 1
    # Outside of a training's step the error is itself.
    with pytest.raises(FloatingPointError, match="contain Inf/NaN"):
        built.model([image(float("nan"))])


def test_steps_are_left_out_up_to_the_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = [image(1.0)], [image(float("nan"))]
    left_out = trainer(tmp_path, [good, bad, good, bad, good], max_skipped_steps=2)
    left_out.train(0, 5)
    expected = trainer(tmp_path, [good] * 3)
    expected.train(0, 3)
    assert torch.equal(left_out.model.layer.weight, expected.model.layer.weight)
    assert "2 of at most 2" in caplog.text

    # The budget is the training's, not the process's.
    resumed = trainer(tmp_path, [bad], max_skipped_steps=2)
    resumed.load_state_dict(left_out.state_dict())
    with pytest.raises(NonFiniteLossError, match="iteration 5"):
        resumed.train(5, 6)


def test_broken_running_statistics_cannot_be_left_out(tmp_path: Path) -> None:
    class WithNorm(Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {"loss": self.norm(torch.stack([i["image"] for i in batch])).square().sum()}

    batch = [image(1.0), image(float("nan"))]
    built = trainer(tmp_path, [batch], WithNorm(), max_skipped_steps=9)
    with pytest.raises(NonFiniteLossError, match=r"running statistics.*norm\.running_mean"):
        built.train(0, 1)


def test_a_full_disk_does_not_keep_a_step_from_being_left_out(
    tmp_path: Path, file_size_limit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    built = trainer(tmp_path, [[image(float("nan"))]], max_skipped_steps=1)
    with file_size_limit(100):
        built.train(0, 1)
    assert "cannot be written" in caplog.text
    assert not list((tmp_path / "nonfinite").iterdir())


def test_a_full_disk_does_not_hide_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NonFiniteLossError, match="iteration 0: rank 0: loss_a"):
        trainer(tmp_path, [[image(float("nan"))]]).train(0, 1)
    assert "No space left on device" in caplog.text


def test_what_is_written_repeats_the_step(tmp_path: Path) -> None:
    """The model's own input with every kind of ground truth, its weights and random numbers."""
    instances = Instances((4, 6))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    instances.gt_classes = torch.tensor([3])
    instances.gt_masks = PolygonMasks([[np.array([0.0, 0.0, 2.0, 0.0, 2.0, 2.0])]])
    instances.gt_keypoints = Keypoints(torch.ones(1, 2, 3))
    others = Instances((4, 6), gt_masks=BitMasks(torch.ones(1, 4, 6, dtype=torch.bool)))
    batch = [image(float("nan"), instances=instances), image(1.0, instances=others, height=4)]
    built = trainer(tmp_path, [[image(1.0)], batch])
    with pytest.raises(NonFiniteLossError):
        built.train(0, 2)

    content = read_batch(str(tmp_path / "nonfinite" / "iteration_0000001_rank0_0.pth"))
    assert content["iteration"] == 1
    assert np.isnan(content["losses"]["loss_a"])
    first, second = content["batch"]
    assert first["file_name"] == "nan.jpg"
    read = first["instances"]
    assert read.image_size == (4, 6)
    assert torch.equal(read.gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(read.gt_keypoints.tensor, instances.gt_keypoints.tensor)
    assert np.array_equal(read.gt_masks.polygons[0][0], instances.gt_masks.polygons[0][0])
    assert torch.equal(second["instances"].gt_masks.tensor, others.gt_masks.tensor)
    model = Model()
    model.load_state_dict(content["model"])
    assert torch.equal(model.layer.weight, built.model.layer.weight)
    set_random_state(content["random"])
    model(content["batch"])
    assert model.drawn == built.model.drawn[-1:]


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model_final.pth"
    torch.save({"model": {}}, file)
    with pytest.raises(UserError, match=r"model_final\.pth is not a file"):
        read_batch(str(file))
