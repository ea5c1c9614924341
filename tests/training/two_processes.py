"""What each of the two processes of test_two_processes.py does."""

import contextlib
from pathlib import Path
from typing import Any

import torch

import mask_rcnn_plugin  # noqa: F401  first, as a spawned process imports nothing before

# isort: split
from detectron2.engine import hooks
from detectron2.layers import NaiveSyncBatchNorm
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.evaluation import testing
from mask_rcnn_plugin.main_process import on_main_process
from mask_rcnn_plugin.training.checkpoint import CheckpointHook, SafeCheckpointer
from mask_rcnn_plugin.training.early_stopping import EarlyStopping, StoppedEarly
from mask_rcnn_plugin.training.guarded_trainer import GuardedTrainer
from mask_rcnn_plugin.training.launch import destroy_process_group
from mask_rcnn_plugin.training.nonfinite import NonFiniteLossError
from mask_rcnn_plugin.training.validation_loss import validation_losses
from mask_rcnn_plugin.training.weight_average import WeightAverage


def image(value: float, diverges: bool = False) -> dict[str, Any]:
    pixels = torch.tensor([value, 1.0]).view(1, 2, 1)
    return {"file_name": f"{value}.jpg", "image": pixels, "diverges": diverges}


class Model(nn.Module):
    """Fails between backbone and head, as detectron2's RPN does where its boxes are not finite."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(1, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(2, 2, 1), norm or nn.Identity())

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        x = self.backbone(torch.stack([i["image"] for i in batch]))
        if any(i["diverges"] for i in batch):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return {"loss": (self.head(x) - 1).square().mean(dim=(1, 2, 3)).mean()}


def train_with(
    folder: Path, model: nn.Module, batches: list[Any], steps: int, accumulate_steps: int = 1
) -> tuple[str, list[Tensor]]:
    """Train with one step that may be left out.

    Returns:
        The error's message, "" without one, and the weights.
    """
    built = GuardedTrainer(
        model,
        batches,
        torch.optim.SGD(model.parameters(), lr=0.1),
        accumulate_steps=accumulate_steps,
        max_skipped_steps=1,
        output_dir=str(folder),
    )
    message = ""
    try:
        built.train(0, steps)
    except NonFiniteLossError as error:
        message = str(error)
    return message, [p.detach().clone() for p in model.parameters()]


def accumulated(rank: int, folder: Path) -> tuple[str, list[Tensor]]:
    """Two batches a step; the third and fourth step are rank 1's undoing, in the second batch.

    With what may be switched on around it: a backbone that is compiled, gradients in DDP's buckets.
    """
    good = [[image(float(i))] for i in range(8)][rank::2]
    broken = [image(9.0, diverges=rank == 1)]
    batches = [*good, good[0], broken, good[0], broken]
    model = Model()
    model.backbone.compile(backend="eager", dynamic=True)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return train_with(folder, ddp, batches, 4, accumulate_steps=2)


class Renaming(Model):
    """An image says what is added to the names of its losses."""

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        losses = super().forward(batch)
        return losses | dict.fromkeys(batch[0].get("more", []), losses["loss"] * 2)


def renamed(rank: int, folder: Path) -> tuple[dict[str, float], str]:
    """The first step is rank 1's undoing, before it is known what losses there are; then each has
    one more; then rank 1 alone has.

    Returns:
        Metrics after the good steps and the error's message.
    """
    more = [[], ["a"], ["a", "b"] if rank else ["a"]]
    batches = [[image(rank + 1.0, diverges=rank == 1)]]
    batches += [[{**image(rank + 1.0), "more": names}] for names in more]
    model = DistributedDataParallel(Renaming())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    built = GuardedTrainer(model, batches, optimizer, max_skipped_steps=1, output_dir=str(folder))
    try:
        built.train(0, 4)
    except UserError as error:
        return {name: value for name, (value, _) in built.storage.latest().items()}, str(error)
    return {}, ""


def synchronized(rank: int, folder: Path) -> str:
    """Rank 1 diverges in the second step, while rank 0 waits for it in the head's norm."""
    batches = [[image(rank + 1.0)], [image(rank + 3.0, diverges=rank == 1)]]
    model = DistributedDataParallel(Model(NaiveSyncBatchNorm(2)))
    try:
        return train_with(folder, model, batches, 2)[0]
    except RuntimeError as error:
        return f"lost: {error}"


def weights_of_rank_0(rank: int, folder: Path) -> list[Tensor]:
    """Each loads a file of its own; rank 1's is missing."""
    model = Model()
    if rank == 0:
        torch.save({"model": {k: v + 1 for k, v in Model().state_dict().items()}}, folder / "w.pth")
    path = folder / "w.pth" if rank == 0 else folder / "elsewhere" / "w.pth"
    SafeCheckpointer(DistributedDataParallel(model), str(folder)).resume_or_load(str(path))
    return list(model.state_dict().values())


def missing_at_rank_0(rank: int, folder: Path) -> str:
    path = folder / ("nowhere.pth" if rank == 0 else "w.pth")
    try:
        SafeCheckpointer(Model(), str(folder)).load_strictly(str(path))
    except UserError as error:
        return str(error)
    return ""


def checkpoint_of_rank_0(rank: int, folder: Path) -> tuple[bool, bool]:
    """Whether it resumes where rank 0's folder has a checkpoint, and where only rank 1's has."""
    found = []
    for owner in range(2):
        own = folder / f"owner{owner}_rank{rank}"
        own.mkdir()
        if rank == owner:
            content = {"model": Model().state_dict(), "iteration": 1}
            torch.save(content, own / "model_final.pth")
        found.append(bool(SafeCheckpointer(Model(), str(own)).resume_or_load("")))
    return found[0], found[1]


def both(rank: int, folder: Path) -> str:
    """A mistake of the main process is one of all."""

    def mistake() -> None:
        raise UserError(f"of rank {rank}")

    try:
        on_main_process(mistake)
    except UserError as error:
        return str(error)
    return ""


def averaged(rank: int, folder: Path) -> list[Tensor]:
    """The average of two steps on a process's own images, from weights drawn by each process."""
    model = Model()
    if rank:
        nn.init.normal_(model.head[0].weight)
    average = WeightAverage(model, 0.5)
    ddp = DistributedDataParallel(model)
    SafeCheckpointer(average.model, str(folder)).resume_or_load("")
    batches = [[image(rank + 1.0)], [image(rank + 3.0)]]
    built = GuardedTrainer(ddp, batches, torch.optim.SGD(ddp.parameters(), lr=0.1))
    built.register_hooks([average])
    built.train(0, 2)
    return list(average.model.state_dict().values())


def evaluated(rank: int, folder: Path) -> list[float]:
    """Running means that two evaluations see, which each process has of its own before."""
    seen = []

    def infer(model: nn.BatchNorm1d, *_: Any) -> dict[str, Any]:
        seen.append(model.running_mean.item())
        raise InterruptedError

    testing.instantiate, testing.inference_on_dataset = lambda node: node, infer
    cfg = OmegaConf.create({"dataloader": {"test": 0, "evaluator": 0}, "train": {"output_dir": ""}})
    for wrap in (DistributedDataParallel, lambda model: model):
        norm = nn.BatchNorm1d(1)
        norm.running_mean.fill_(rank + 1.0)
        with contextlib.suppress(InterruptedError):
            testing.evaluate(cfg, wrap(norm))
    return seen


def stopped(rank: int, folder: Path) -> int:
    """The iteration after which a training ends whose scores the first process alone knows."""
    model = DistributedDataParallel(Model())
    built = GuardedTrainer(model, [[image(1.0)]] * 9, torch.optim.SGD(model.parameters(), lr=0.1))
    folder.mkdir(exist_ok=True)
    checkpointer = SafeCheckpointer(model, str(folder), trainer=built)
    saving = CheckpointHook(checkpointer, 99)
    stopping = EarlyStopping(saving, metric="segm/AP", patience=3)
    evaluation = hooks.CallbackHook(
        after_step=lambda _: stopping.update({} if rank else {"segm": {"AP": 1.0}})
    )
    built.register_hooks([saving, evaluation, stopping])
    with contextlib.suppress(StoppedEarly):
        built.train(0, 9)
    return int(built.iter)


def validated(rank: int, folder: Path) -> dict[str, float]:
    return validation_losses(Model(), [[image(1.0)], [image(2.0, diverges=rank == 1)]])


def one_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    own: dict[str, Any] = {
        "accumulated": accumulated(rank, folder / "accumulated"),
        "renamed": renamed(rank, folder / "renamed"),
        "weights": weights_of_rank_0(rank, folder),
        "missing": missing_at_rank_0(rank, folder),
        "checkpoint": checkpoint_of_rank_0(rank, folder),
        "both": both(rank, folder),
        "averaged": averaged(rank, folder),
        "evaluated": evaluated(rank, folder),
        "stopped": stopped(rank, folder / "stopped"),
        "validated": validated(rank, folder),
    }
    own["synchronized"] = synchronized(rank, folder)  # the last, as one of them ends
    destroy_process_group()
    torch.save(own, folder / f"rank{rank}.pth")
