"""Learning-rate schedules."""

from collections.abc import Sequence
from itertools import pairwise

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler


def warmup_multistep(
    max_iter: int, drop_at: Sequence[float], warmup_iters: int = 0, warmup_factor: float = 0.001
) -> WarmupParamScheduler:
    """Divide the learning rate by 10 at given points of the training, after a linear warm-up.

    Args:
        max_iter: iterations of the whole training.
        drop_at: when to divide, as fractions of it: [120 / 160] is "by 10 at 120k of 160k"
            (Sec. 3.1), so that a shorter training keeps its shape.
        warmup_iters: iterations from warmup_factor of the rate to the whole. A training that is
            shorter ends while still warming up.
        warmup_factor: see above.

    Raises:
        ValueError: if drop_at is not increasing in (0, 1), or warmup_iters is negative.
    """
    points = [0.0, *drop_at, 1.0]
    if any(a >= b for a, b in pairwise(points)):
        raise ValueError(f"drop_at is {list(drop_at)}, must be increasing fractions in (0, 1)")
    if warmup_iters < 0:
        raise ValueError(f"warmup_iters is {warmup_iters}, must be 0 or more")
    # In a training of a few iterations drops may fall together, or on its ends: none then.
    milestones = sorted({round(f * max_iter) for f in drop_at} - {0, max_iter})
    steps = MultiStepParamScheduler(
        values=[0.1**i for i in range(len(milestones) + 1)],
        milestones=milestones,
        num_updates=max_iter,
    )
    return WarmupParamScheduler(steps, warmup_factor, min(warmup_iters / max_iter, 1.0))
