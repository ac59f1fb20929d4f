import pytest
import torch


@pytest.fixture(autouse=True)
def double_precision():
    """torch.optim counts steps in the default dtype, and so rounds β**step to it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
