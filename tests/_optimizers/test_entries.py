"""Small parameters go through operations as one, and come apart as they were."""

import pytest
import torch
from torch import Tensor, nn, optim

from reweight._optimizers import entries
from reweight._optimizers.entries import joined, parted, together
from reweight._optimizers.pseudo_update import pseudo_update


def test_small_ones_that_are_alike_go_together() -> None:
    small, large = torch.ones(2, 3), torch.ones(1 << 13)
    assert together([small, large, small, small.half(), small.T]) == [[0, 2], [1], [3], [4]]


def test_joined_and_parted_is_the_same() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(0, 4), torch.randn(5)]
    parts = parted(joined(tensors), tensors)
    assert all(map(torch.equal, parts, tensors))
    assert joined(tensors[:1]) is tensors[0]
    assert parted(tensors[0], tensors[:1])[0] is tensors[0]


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.NAdam, optim.Adagrad])
def test_a_step_in_blocks_is_the_same(kind, monkeypatch) -> None:
    """By rule and recorded; of parameters that fill blocks, share one, or fit in none."""
    shapes = [(50, 30), (7, 5), (4, 3), (3,), (0, 4), ()]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters[1] = nn.Parameter(torch.randn(5, 7).T)
    optimizer = kind(parameters, lr=0.1)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    gradients = {str(i): torch.randn_like(p).requires_grad_() for i, p in enumerate(parameters)}

    def ahead() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        named = {str(i): p for i, p in enumerate(parameters)}
        moved = list(pseudo_update([optimizer], named, gradients).parameters.values())
        return moved, torch.autograd.grad(sum(m.sum() for m in moved), list(gradients.values()))

    moved, slopes = ahead()
    monkeypatch.setattr(entries, "_BLOCK", 40)
    in_blocks, slopes_in_blocks = ahead()
    assert [p.shape for p in in_blocks] == [p.shape for p in parameters]
    assert in_blocks[1].stride() == parameters[1].stride()
    assert all(map(torch.equal, in_blocks, moved))
    assert all(map(torch.equal, slopes_in_blocks, slopes))
