import pytest
import torch

torch.set_num_threads(1)  # the tensors here are tiny


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
