"""A model whose weights are an average of those of the last iterations."""

from typing import Any

from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage(HookBase):
    """Keeps an exponential moving average of a model's weights, running statistics included.

    The average is what to evaluate and to save as a checkpoint's "model", so that whatever loads
    the checkpoint gets it. The weights that are trained are in this hook's state, for a resume.
    Steps that are left out do not count. Each process computes the same average of its own; with
    batch norm that is not synchronised the running statistics differ, and the first process's
    count, as without an average. Register it before what saves.

    Args:
        model: not wrapped for DDP.
        decay: share of the old average after a step. The first ones go faster: the decay is at most
            (1 + n) / (10 + n) after n steps, so a short training is not averaged with its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def update(average: Any, trained: Any, _: Tensor | int) -> None:
            steps = int(self._average.n_averaged)  # on the CPU, unlike the argument
            function = get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))
            function(average, trained, steps)

        self._trained = model
        self._average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self._stepped = False

    @property
    def model(self) -> nn.Module:
        """The average, which starts from the weights that are loaded into it."""
        return self._average.module

    def before_train(self) -> None:
        if not self._average.n_averaged:
            self._trained.load_state_dict(self.model.state_dict())
            self._average.n_averaged.fill_(1)
        self.trainer.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def after_step(self) -> None:
        if self._stepped:
            self._average.update_parameters(self._trained)
        self._stepped = False

    def state_dict(self) -> dict[str, Any]:
        return {"model": self._trained.state_dict(), "steps": int(self._average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trained.load_state_dict(state["model"])
        self._average.n_averaged.fill_(state["steps"])
