"""The warm-up of the learning rate, in iterations."""


def warmup_length(iterations: int, max_iter: int) -> float:
    """What detectron2's `WarmupParamScheduler` takes: the warm-up as a part of the training.

    Args:
        iterations: of the warm-up. A training that is shorter ends while still warming up.
        max_iter: of the whole training.
    """
    return min(iterations / max_iter, 1.0)
