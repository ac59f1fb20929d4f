"""The step of the class itself: on copies, and of it no trace is left."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn, optim

from properties import assert_same
from reweight._optimizers.own_step import Widened, copied, own_step
from steps import STEPS, Noisy, Taken


@pytest.mark.parametrize("name", STEPS)
def test_it_is_the_next_and_nothing_changes(name: str) -> None:
    taken = Taken(STEPS[name], torch.float32)
    state = copy.deepcopy(taken.optimizer.state_dict())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    gradients = {id(p): g for p, g in zip(taken.parameters, taken.gradients, strict=True)}
    moved = own_step(taken.optimizer, gradients, copied)
    assert_same(taken.optimizer.state_dict(), state)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    for p, own in zip(taken.parameters, taken.step(taken.gradients), strict=True):
        assert torch.equal(moved[id(p)], own)


def test_in_another_precision_it_is_that_of_a_model_in_that() -> None:
    class Low(Noisy):
        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.bfloat16())

    p, g = nn.Parameter(torch.ones(3)), torch.tensor([0.3, 1.7, 1e-3])
    moved = own_step(Low([p]), {id(p): g}, lambda t: copied(t, torch.float64), torch.float64)
    assert torch.equal(moved[id(p)], 1 - g.double())
    with Widened(torch.float64):
        assert torch.ones(1, dtype=torch.float32).dtype is torch.float64


def test_copies_share_no_memory() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert copied(p).dtype is torch.bfloat16
    assert copied(p, torch.float64).dtype is torch.float64
    copied(p).zero_()
    optimizer = optim.SGD([p], lr=1.0, momentum=0.9)
    own_step(optimizer, {id(p): torch.ones_like(p)}, copied)
    assert p.all()
    assert not optimizer.state
