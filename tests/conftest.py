import pytest
import torch

from reweight._kernels import function, linear, torch_kernels

torch.set_num_threads(1)  # the tensors here are tiny


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["merged", "whole", "in blocks"])
def sizes(request, monkeypatch) -> None:
    """The ways that a size decides, on tensors that are small."""
    if request.param != "merged":
        monkeypatch.setattr(function, "_SMALL", 0)
        monkeypatch.setattr(torch_kernels, "_TINY", 0)
    if request.param == "in blocks":
        monkeypatch.setattr(function, "_LARGE", 0)
        monkeypatch.setattr(torch_kernels, "_WHOLE", 0)
        monkeypatch.setattr(torch_kernels, "_BLOCK", 11)
        monkeypatch.setattr(linear, "_CHUNK", 7)
