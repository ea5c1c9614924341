import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for every test, whichever ran before."""
    torch.manual_seed(0)
