"""The learning rate of a batch."""


def linear_rate(rate: float, reference: int, batch: int) -> float:
    """By the linear rule.

    Args:
        rate: that of a batch of `reference` images.
        batch: in images.
    """
    return rate * batch / reference
