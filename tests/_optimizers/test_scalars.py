"""Numbers that a step takes out of tensors."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import SymFloat, nn, optim

from reweight._optimizers.recorded_step import How, recorded_step


class Scaled(optim.SGD):
    """A factor that a function makes of the gradient's norm."""

    factor: Callable[[float], float]

    @torch.no_grad()
    def step(self) -> None:
        (p,) = self.param_groups[0]["params"]
        p.mul_(self.factor(p.grad.norm().item()))


@pytest.mark.parametrize(
    "factor",
    [
        lambda x: 3 * x,
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x - 1,
        lambda x: 1 / x,
        lambda x: x / 3,
        lambda x: x**3,
        lambda x: x**0.5,
        lambda x: -x,
        lambda x: abs(x),
        lambda x: max(x, 1.0),
        lambda x: min(x, 3.0) * x,
        lambda x: x if x > 1 and x >= 1 and not x < 1 and x != 1 else 0.0 * x,
        lambda x: torch.sym_sqrt(x) if isinstance(x, SymFloat) else math.sqrt(x),
    ],
)
def test_arithmetic_keeps_the_derivative(factor) -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Scaled([p], lr=0.1)
    optimizer.factor = factor
    g = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    moved, recorder = recorded_step(optimizer, {id(p): g})
    slope = torch.autograd.grad(moved[id(p)].sum(), g)[0].item()
    expected = (factor(2.0 + 1e-6) - factor(2.0 - 1e-6)) / 2e-6
    assert moved[id(p)].item() == factor(2.0)
    assert slope == pytest.approx(expected, rel=1e-8)
    assert not recorder.has_constants


def test_what_is_no_arithmetic_makes_a_constant_and_is_counted() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Scaled([p], lr=0.1)
    optimizer.factor = math.exp
    g = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    moved, recorder = recorded_step(optimizer, {id(p): g})
    assert moved[id(p)].item() == math.exp(2.0)
    assert not moved[id(p)].requires_grad
    assert recorder.has_constants


def test_code_that_takes_no_other_number_gets_a_constant() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Scaled([p], lr=0.1)
    optimizer.factor = lambda x: {float: 3.0}[type(x)] * x
    g = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(KeyError):
        recorded_step(optimizer, {id(p): g})
    moved, recorder = recorded_step(optimizer, {id(p): g}, How(keeps_numbers=False))
    assert moved[id(p)].item() == 6
    assert recorder.has_constants


@pytest.mark.parametrize("take", [float, lambda t: t.tolist(), lambda t: bool(t > 0) * 2.0])
def test_other_ways_out_of_a_tensor(take) -> None:
    class Takes(optim.SGD):
        @torch.no_grad()
        def step(self) -> None:
            (p,) = self.param_groups[0]["params"]
            p.grad.mul_(3)  # which memory does not know of
            p.mul_(take(p.grad.sum()))

    p = nn.Parameter(torch.ones(1))
    g = torch.full((1,), 2.0, requires_grad=True)
    moved, _ = recorded_step(Takes([p], lr=0.1), {id(p): g})
    assert moved[id(p)].item() == take(torch.tensor(6.0))
