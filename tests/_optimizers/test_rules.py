"""Each rule in closed form: the step is the stock optimizer's, the slope its derivative."""

import copy

import pytest
import torch
from torch import Tensor, optim

from reweight._optimizers.rules import RULES

OPTIONS = {
    optim.SGD: [{"lr": 1.0}, {"lr": 1.0, "momentum": 0.9, "dampening": 0.2}],
    optim.Adam: [{}, {"betas": (0.8, 0.9), "eps": 1e-3}],
    optim.AdamW: [{"weight_decay": 0.0}],
    optim.RAdam: [{}, {"betas": (0.5, 0.999)}],
    optim.Adamax: [{}],
}
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]


def test_every_rule_is_tried() -> None:
    assert OPTIONS.keys() == RULES.keys()


def warm(kind, options, num_steps: int) -> tuple[optim.Optimizer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = kind([parameter], **options)
    for _ in range(num_steps):
        parameter.grad = torch.randn(4, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("num_steps", [1, 7])  # RAdam rectifies from the sixth on
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_step_is_the_stock_optimizers_and_the_slope_its_derivative(
    kind, options, num_steps: int
) -> None:
    optimizer, parameter = warm(kind, options, num_steps)
    (group,) = optimizer.param_groups
    state = optimizer.state[parameter]
    moments = {name: value for name, value in state.items() if name != "step" and value is not None}
    kept = copy.deepcopy(moments)
    d = torch.tensor([0.3, -0.8, 1.1, -0.2], dtype=torch.float64)
    step, slope = RULES[kind](group, moments, lambda of: of(num_steps + 1), d)
    assert all(torch.equal(moments[name], kept[name]) for name in kept), "it changes no moment"

    def stock_step(d: Tensor) -> Tensor:
        """By how much the parameter falls, at a rate of 1."""
        twin, moved = warm(kind, options, num_steps)
        before, moved.grad = moved.detach().clone(), d
        twin.step()
        return (before - moved.detach()) / group["lr"]

    torch.testing.assert_close(step, stock_step(d), rtol=1e-9, atol=1e-9)  # α·s was rounded to θ
    h = 1e-6
    differences = (stock_step(d + h) - stock_step(d - h)) / (2 * h)
    # Differences: h² of the third derivative, and rounding of θ by 1e-16 over h and the rate.
    torch.testing.assert_close(torch.as_tensor(slope).expand(4), differences, rtol=1e-6, atol=2e-7)


def test_a_root_at_zero_has_no_slope() -> None:
    """It is not finite, for the pseudo update to find and count."""
    d = torch.zeros(2)
    group = {"betas": (0.9, 0.999), "eps": 1e-8}
    step, slope = RULES[optim.Adam](group, {}, lambda of: of(1), d)
    assert torch.equal(step, d)
    assert not slope.isfinite().any()
