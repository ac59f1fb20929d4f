"""A step that is looked ahead to, as a whole."""

import random

import numpy as np
import pytest
import torch
from torch import nn, optim

from reweight._optimizers.recorded_step import How, recorded_step
from steps import GlobalNorm, Noisy, Taken, two_groups


def test_randomness_is_replayed_and_put_back() -> None:
    class Draws(Noisy):
        @torch.no_grad()
        def step(self) -> None:
            super().step()
            for p in self.param_groups[0]["params"]:
                p.add_(random.random() + np.random.rand())

    taken = Taken(Draws)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    gradients = {id(p): g for p, g in zip(taken.parameters, taken.gradients, strict=True)}
    moved = recorded_step(taken.optimizer, gradients).parameters
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()
    for p, own in zip(taken.parameters, taken.step(taken.gradients), strict=True):
        assert torch.equal(moved[id(p)], own)


def test_groups_that_depend_on_each_other_do_so() -> None:
    taken = Taken(lambda parameters: GlobalNorm(two_groups(parameters)))
    leaves = [g.clone().requires_grad_() for g in taken.gradients]
    gradients = {id(p): g for p, g in zip(taken.parameters, leaves, strict=True)}
    moved = recorded_step(taken.optimizer, gradients).parameters
    across = torch.autograd.grad(moved[id(taken.parameters[0])].sum(), leaves)
    assert all(v.abs().sum() > 0 for v in across)


def test_parameters_of_others_count_with_the_gradient_they_have() -> None:
    def ahead(gradient):
        taken = Taken(lambda parameters: GlobalNorm(two_groups(parameters)))
        taken.parameters[3].grad = gradient
        others = zip(taken.parameters[:3], taken.gradients, strict=False)
        moved = recorded_step(taken.optimizer, {id(p): g for p, g in others}).parameters
        assert id(taken.parameters[3]) not in moved
        assert taken.parameters[3].grad is gradient
        return moved[id(taken.parameters[0])]

    large, none = ahead(torch.full((1,), 1e3).double()), ahead(None)
    start = Taken(lambda parameters: GlobalNorm(two_groups(parameters))).parameters[0]
    assert (large - start).norm() < 1e-2 * (none - start).norm()


@pytest.mark.parametrize("requires_grad", [True, False], ids=["unused", "frozen"])
def test_a_parameter_without_gradient_is_skipped(requires_grad: bool) -> None:
    p = nn.Parameter(torch.ones(2))
    idle = nn.Parameter(torch.ones(2), requires_grad)
    optimizer = optim.NAdam([p, idle], weight_decay=0.1)
    g = torch.ones(2, requires_grad=True)
    moved = recorded_step(optimizer, {id(p): g, id(idle): None}).parameters
    assert set(moved) == {id(p)}
    assert not optimizer.state


def test_fused_kernels_give_the_values_and_others_the_derivative() -> None:
    taken = Taken(lambda parameters: optim.Adam(parameters, amsgrad=True, fused=True))
    leaves = [g.clone().requires_grad_() for g in taken.gradients]
    moved = recorded_step(
        taken.optimizer, {id(p): g for p, g in zip(taken.parameters, leaves, strict=True)}
    ).parameters
    assert all(new.requires_grad for new in moved.values())
    for p, own in zip(taken.parameters, taken.step(taken.gradients), strict=True):
        assert torch.equal(moved[id(p)], own)
    assert taken.optimizer.param_groups[0]["fused"]


def test_lower_precision_is_kept_for_code_that_does_not_bear_more() -> None:
    class Strict(optim.SGD):
        @torch.no_grad()
        def step(self) -> None:
            (p,) = self.param_groups[0]["params"]
            low = p.grad.to(torch.bfloat16)
            assert low.dtype is torch.bfloat16
            p.sub_(low.float())

    p = nn.Parameter(torch.ones(2))
    g = torch.full((2,), 0.3, requires_grad=True)
    with pytest.raises(AssertionError):
        recorded_step(Strict([p], lr=0.1), {id(p): g})
    moved, _ = recorded_step(Strict([p], lr=0.1), {id(p): g}, How(widened=False))
    assert torch.equal(moved[id(p)], 1 - g.bfloat16().float())
    assert torch.equal(torch.autograd.grad(moved[id(p)].sum(), g)[0], -torch.ones(2))
