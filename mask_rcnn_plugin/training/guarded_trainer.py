"""One step of a training: detectron2's trainer, with what days on many GPUs need besides."""

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.training.checkpoint import SaveError, write_checkpoint
from mask_rcnn_plugin.training.machine import precision
from mask_rcnn_plugin.training.nonfinite import NonFiniteLossError
from mask_rcnn_plugin.training.random_states import random_state

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]
Drawn = tuple[Batch, dict[str, Tensor]]  # with the random state before it

_SYNCHRONIZED = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
_FAILED = "forward pass"  # stands for all losses of a batch whose forward pass has failed


class _Step(NamedTuple):
    """What a process tells the others of its step: numbers, as they go in one tensor."""

    data_time: float
    signalled: float
    differs: float  # whether its losses have other names than all have agreed on
    failed: float  # whether a forward pass has
    grad_norm: float
    losses: list[float]  # of the batches, one after the other

    @property
    def sound(self) -> bool:
        return not self.failed and all(map(math.isfinite, self.losses))

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Of the losses over the batches."""
        batches = len(self.losses) // max(1, len(names))
        return {name: sum(self.losses[i :: len(names)]) / batches for i, name in enumerate(names)}


class GuardedTrainer(SimpleTrainer):
    """detectron2's `SimpleTrainer` with three additions:

    * gradients over several batches a step, of which the processes exchange the sum once;
    * mixed precision in bfloat16, on CUDA or a CPU, or in float16 with loss scaling, on CUDA;
    * no step is taken on a loss or gradient that is not finite. All processes learn in the one
      exchange of the metrics whether any of them has such, so they stop, or skip, together; those
      that have write what is needed to repeat the step (`read_batch`).

    That exchange is one small all-reduce on the device, and the host waits for the device once a
    step, to read its result. A process by itself exchanges nothing.

    A hook may set `signalled`; in the same exchange all learn whether any process has it set, which
    is `any_signalled` after the step.

    Hooks are called once a step of the optimizer. Losses and rates in the metrics are those of the
    step; `grad_norm` is the L2 norm of all gradients together. Where they overflow in float16,
    there is none and the optimizer takes no step, but the next losses are scaled less.

    Args:
        model: takes a batch, returns a dict of scalar losses; may be wrapped for DDP.
        data_loader: iterable of batches, lists of detectron2's dicts.
        optimizer: of the model's parameters.
        device: where the model is.
        dtype: None, torch.bfloat16 or torch.float16.
        accumulate_steps: batches a step. Their losses are averaged: where a loss is a mean over
            images the gradient is that of one batch of all of them.
        max_skipped_steps: how many steps with a non-finite loss or gradient are left out before
            the training stops, resumes counted together.
        output_dir: where such steps are written.
        images_per_step: of all processes together.
        scale_iterations: after a resume with another `images_per_step`, count the iterations that
            are done in the new steps, as the schedule is scaled to them.

    Raises:
        NonFiniteLossError: from `run_step`.
        UserError: from `run_step`, in all processes, if their models return different losses.
    """

    # A file holds the weights, hundreds of megabytes: more of them tell no more.
    _MAX_FILES: ClassVar[int] = 5

    iter: int

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        accumulate_steps: int = 1,
        max_skipped_steps: int = 0,
        output_dir: str = ".",
        images_per_step: int = 1,
        scale_iterations: bool = False,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self._device_type = torch.device(device).type
        self._dtype = dtype
        self._scaler = torch.amp.GradScaler(self._device_type, enabled=dtype == torch.float16)
        self._accumulate_steps = accumulate_steps
        self._max_skipped_steps = max_skipped_steps
        self._skipped_steps = 0
        self._loss_names: Sequence[str] = ()  # of all processes, in the order of their exchange
        self.signalled = self.any_signalled = False
        self._output_dir = output_dir
        self._images_per_step = images_per_step
        self._scale_iterations = scale_iterations
        self._shares_statistics = comm.get_world_size() > 1 and any(
            isinstance(module, _SYNCHRONIZED) for module in model.modules()
        )

    def run_step(self) -> None:
        self.optimizer.zero_grad()
        batches: list[Drawn] = []
        losses: list[dict[str, Tensor]] = []
        data_time = 0.0
        for remaining in reversed(range(self._accumulate_steps)):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            batches.append((batch, random_state()))
            ddp = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if ddp and remaining else contextlib.nullcontext():
                try:
                    losses.append(self.backward(batch))
                except FloatingPointError as error:
                    raise self._end_alone(error, batches[-1]) from error

        if hasattr(self, "after_backward"):  # detectron2's main calls hooks here
            self.after_backward()

        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        every = self._exchange(losses, self._gradient_norm(losses[0]), data_time)
        self.any_signalled = any(rank.signalled for rank in every)
        sound = all(rank.sound for rank in every)
        overflow = not all(math.isfinite(rank.grad_norm) for rank in every)
        if not sound or (overflow and not self._scaler.is_enabled()):
            self._scaler.update()
            self._skip(every, losses, batches)
            return
        self._put_metrics(every)
        if not overflow:  # the scaler would ask a fused optimizer, and SGD's gets it wrong
            self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            raise NonFiniteLossError(
                f"gradients overflow in float16 at iteration {self.iter}, however small the loss "
                "is scaled: train.amp.dtype=bf16 has a larger range"
            )

    def autocast(self) -> torch.autocast:
        """The precision that the forward pass runs in."""
        return torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not None)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Add a batch's share to the gradients.

        Returns:
            The model's losses, detached scalars; {"forward pass": NaN} where detectron2's RPN ends
            the forward pass with an error, as its boxes are not finite.

        Raises:
            FloatingPointError: that error, if the model has synchronised batch norms: the other
                processes may wait for this one in any of them.
        """
        try:
            with self.autocast():
                losses = self.model(batch)
        except FloatingPointError as error:
            if self._shares_statistics:
                raise
            logger.warning("%s", error)
            losses = self._nan_losses(batch)
        self._scaler.scale(sum(losses.values()) / self._accumulate_steps).backward()
        return {name: loss.detach().float() for name, loss in losses.items()}

    def _nan_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses in place of a failed forward pass, from which each parameter has a gradient.

        The other processes wait for them, so DDP must see a forward pass.
        """
        ddp = self.model
        if not isinstance(ddp, DistributedDataParallel):
            return _NaNLosses(ddp)(batch)
        model, broadcast_buffers = ddp.module, ddp.broadcast_buffers
        ddp.module, ddp.broadcast_buffers = _NaNLosses(model), False  # they are broadcast already
        try:
            return ddp(batch)
        finally:
            ddp.module, ddp.broadcast_buffers = model, broadcast_buffers

    def _gradient_norm(self, losses: dict[str, Tensor]) -> Tensor:
        """() float32 on the device of the losses."""
        parameters = chain.from_iterable(g["params"] for g in self.optimizer.param_groups)
        gradients = [p.grad for p in parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients).to(next(iter(losses.values())))

    def _exchange(
        self, parts: list[dict[str, Tensor]], norm: Tensor, data_time: float
    ) -> list[_Step]:
        """The step of each process, by rank; `parts` are this one's losses of each batch."""
        names = tuple(dict.fromkeys(name for part in parts for name in part if name != _FAILED))
        if comm.get_world_size() == 1:
            self._loss_names = names
        every = self._gather(parts, norm, data_time, names)
        if any(rank.differs for rank in every):  # as in the first step
            self._agree(names)
            every = self._gather(parts, norm, data_time, names)
        return every

    def _gather(
        self, parts: list[dict[str, Tensor]], norm: Tensor, data_time: float, names: Sequence[str]
    ) -> list[_Step]:
        differs = bool(names) and set(names) != set(self._loss_names)
        failed = any(_FAILED in part for part in parts)
        known = [data_time, float(self.signalled), float(differs), float(failed)]
        losses = [_loss(part, name) for part in parts for name in self._loss_names]
        row = torch.stack([norm, *losses])
        if comm.get_world_size() == 1:
            rows = [known + row.tolist()]
        else:
            row = torch.cat([torch.tensor(known).to(row.device, non_blocking=True), row])
            # Summed with the zeros of the others: any backend can, in log(processes) messages.
            gathered = row.new_zeros(comm.get_world_size(), len(row))
            gathered[comm.get_rank()] = row
            dist.all_reduce(gathered)
            rows = gathered.tolist()
        return [_Step._make([*row[:5], row[5:]]) for row in rows]

    def _agree(self, names: Sequence[str]) -> None:
        """Take the losses' names of all processes; a UserError in all, if some have others."""
        every = comm.all_gather(names)
        self._loss_names = next(filter(None, every))
        if any(names and set(names) != set(self._loss_names) for names in every):
            raise UserError(
                f"the processes have different losses at iteration {self.iter}: "
                + "; ".join(f"rank {rank}: {list(names)}" for rank, names in enumerate(every))
                + ". The model must return the same in each, 0 where there is nothing to learn"
            )

    def _put_metrics(self, every: list[_Step]) -> None:
        """As detectron2's: the mean of each loss over the processes, the longest wait for data."""
        if not comm.is_main_process():
            return
        ranks = [rank.means(self._loss_names) for rank in every]
        losses = {name: sum(rank[name] for rank in ranks) / len(ranks) for name in self._loss_names}
        self.storage.put_scalar("data_time", max(rank.data_time for rank in every))
        self.storage.put_scalar("total_loss", sum(losses.values()))
        self.storage.put_scalars(**losses)
        if math.isfinite(every[0].grad_norm):
            self.storage.put_scalar("grad_norm", every[0].grad_norm)

    def _skip(
        self, every: list[_Step], parts: list[dict[str, Tensor]], batches: list[Drawn]
    ) -> None:
        """Leave a step out or stop, all ranks the same: they have the same `every`."""
        own, names = every[comm.get_rank()], self._loss_names
        broken: list[list[str]] = []
        for i, part in enumerate(parts):
            losses = zip(names, own.losses[i * len(names) :])
            not_finite = [name for name, loss in losses if not math.isfinite(loss)]
            broken.append([_FAILED] if _FAILED in part else not_finite)
        # Of a gradient alone it is not known whose share broke it.
        suspects = [batch for batch, its_broken in zip(batches, broken) if its_broken]
        if all(rank.sound for rank in every):
            suspects = batches
        losses_of_step = own.means(names) | ({_FAILED: math.nan} if own.failed else {})
        mine = {
            "broken": sorted(set(chain.from_iterable(broken))),
            "images": [image["file_name"] for batch, _ in suspects for image in batch],
            "files": self._write(suspects, losses_of_step),
        }
        where = "; ".join(
            f"rank {rank}: {', '.join(of['broken']) or 'gradient'} of {of['images']}"
            + (f", written to {of['files']}" if of["files"] else "")
            for rank, of in enumerate(comm.all_gather(mine))
            if of["images"]
        )
        what = f"loss or gradient not finite at iteration {self.iter}: {where}"
        self._skipped_steps += 1
        if self._skipped_steps > self._max_skipped_steps:
            raise NonFiniteLossError(
                f"{what}. {self._help()} Up to {self._max_skipped_steps} steps may be skipped "
                "(train.max_skipped_steps)."
            )
        buffers = [k for k, b in self.model.named_buffers() if not b.isfinite().all()]
        buffers = sorted(set(chain.from_iterable(comm.all_gather(buffers))))
        if buffers:
            raise NonFiniteLossError(
                f"{what}. The step cannot be skipped, as it has changed running statistics, which "
                f"are not finite now: {buffers[:3]} of {len(buffers)}"
            )
        logger.warning(
            "%s. Step skipped, %d of at most %d", what, self._skipped_steps, self._max_skipped_steps
        )

    def _end_alone(self, error: FloatingPointError, batch: Drawn) -> NonFiniteLossError:
        """What to raise where the other processes wait for this one within the forward pass."""
        files = self._write([batch], {})
        return NonFiniteLossError(
            f"{error} Iteration {self.iter}, rank {comm.get_rank()}: forward pass of "
            f"{[image['file_name'] for image in batch[0]]}, written to {files or 'no file'}. All "
            f"processes end, as the others may wait in a synchronised batch norm. {self._help()}"
        )

    def _help(self) -> str:
        return (
            f"The learning rate at this iteration is {self._lr():.3g}: a lower optimizer.lr, a "
            "longer warm-up or train.amp.enabled=False may help. `python tools/replay.py FILE "
            "--config-file ...`, with the config and the key=value arguments of this training, "
            "repeats the step."
        )

    def _write(self, batches: list[Drawn], losses: dict[str, float]) -> list[str]:
        if self._skipped_steps >= self._MAX_FILES:
            return []
        files = []
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        for number, (batch, random) in enumerate(batches):
            name = f"iteration_{self.iter:07d}_rank{comm.get_rank()}_{number}.pth"
            path = Path(self._output_dir) / "nonfinite" / name
            what = {"batch": batch, "random": random, "losses": losses, "iteration": self.iter}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_checkpoint(path, what | {"lr": self._lr(), "model": model.state_dict()})
            except (SaveError, OSError) as error:  # the report without the file is worth more
                logger.error("%s", error)
                continue
            files.append(str(path))
        return files

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state |= {
            "skipped_steps": self._skipped_steps,
            "images_per_step": self._images_per_step,
            "optimizer_type": type(self.optimizer).__name__,
        }
        if self._scaler.is_enabled():
            state["grad_scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ours = type(self.optimizer).__name__
        if (theirs := state_dict.get("optimizer_type", ours)) != ours:
            raise ConfigError(
                f"the checkpoint is from a training with {theirs}, but the config's optimizer is "
                f"{ours}: use the same one to resume"
            )
        configured = [{**group} for group in self.optimizer.param_groups]
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise ConfigError(
                "the checkpoint's optimizer does not fit the config's, use the same one to resume: "
                f"{error}"
            ) from error
        for group, now in zip(self.optimizer.param_groups, configured):
            # The config counts, also where it has changed. The schedule starts from initial_lr.
            group.update({k: v for k, v in now.items() if k not in ("params", "lr")})
            group["initial_lr"] = now["lr"]
            for parameter in group["params"]:
                _place(self.optimizer.state.get(parameter, {}), parameter, group)
        self._skipped_steps = state_dict.get("skipped_steps", 0)
        self._count_in_own_steps(state_dict.get("images_per_step", self._images_per_step))
        if self._scaler.is_enabled() and "grad_scaler" in state_dict:
            self._scaler.load_state_dict(state_dict["grad_scaler"])

    def _count_in_own_steps(self, before: int) -> None:
        """After a resume whose steps were of `before` images."""
        done, now = self.iter + 1, self._images_per_step
        if before == now:
            return
        if self._scale_iterations:
            self.iter = round(done * before / now) - 1
        logger.warning(
            "A step had %d images before and has %d now: the %d iterations done count as %d "
            "(train.reference_batch_size and train.epochs scale them)",
            *(before, now, done, self.iter + 1),
        )


def _place(state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
    """Bring a parameter's state to where this run's optimizer expects it, and to the layout that
    fused ones take for granted: the file's may be another machine's."""
    on_device = group.get("fused") or group.get("capturable")
    for name, value in state.items():
        if name == "step" and isinstance(value, Tensor):
            state[name] = value.to(parameter.device if on_device else "cpu")
        elif isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = torch.empty_like(parameter).copy_(value)


def _loss(part: dict[str, Tensor], name: str) -> Tensor:
    """One of a batch's losses: NaN if its forward pass has failed, 0 if it is not there."""
    if name in part:
        return part[name]
    return part[_FAILED] if _FAILED in part else torch.zeros_like(next(iter(part.values())))


class _NaNLosses(nn.Module):
    """Stands in for a model whose forward pass has failed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters_of_model = [p for p in model.parameters() if p.requires_grad]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sums = torch.stack([parameter.sum() for parameter in self._parameters_of_model])
        return {_FAILED: sums.sum() * math.nan}


class _InOneLine(logging.Filter):
    """What a user can put right is logged as its message; detectron2 logs a traceback of all."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError):
            record.msg, record.args, record.exc_info = str(error), (), None
        return True


logging.getLogger("detectron2.engine.train_loop").addFilter(_InOneLine())


def build_trainer(
    cfg: DictConfig, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer
) -> GuardedTrainer:
    """The trainer for a config's `train`; see `GuardedTrainer` for the other arguments.

    Raises:
        ConfigError: see `machine.precision`.
    """
    return GuardedTrainer(
        model,
        data_loader,
        optimizer,
        device=device_of(cfg),
        dtype=precision(cfg),
        accumulate_steps=cfg.train.accumulate_steps,
        max_skipped_steps=cfg.train.max_skipped_steps,
        output_dir=cfg.train.output_dir,
        images_per_step=cfg.dataloader.train.total_batch_size * cfg.train.accumulate_steps,
        scale_iterations=cfg.train.reference_batch_size is not None
        or cfg.train.get("epochs") is not None,
    )
