"""Each rule in closed form: the step is the stock optimizer's, the slope its derivative."""

import copy

import pytest
import torch
from torch import Tensor, optim

from ages import OfAges, Operations
from reweight._optimizers import entries
from reweight._optimizers.rules import RULES, by_rule

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


OF_COUNTS = [kind for kind in RULES if kind is not optim.SGD]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OF_COUNTS)
def test_each_parameter_has_its_own_count_where_it_is_on_the_device(
    kind, dtype, monkeypatch
) -> None:
    """RAdam rectifies the steps of some of them."""
    taken = OfAges(kind, dtype)
    for i, p in enumerate(taken.parameters):
        taken.optimizer.state[p]["step"] -= i % 3
    one_by_one = taken.slopes()
    monkeypatch.setattr(entries, "is_elsewhere", lambda tensor: True)
    together = taken.slopes()
    off = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(together, one_by_one, rtol=off, atol=off)
    torch.testing.assert_close(together[0], taken.own(), rtol=off, atol=off)


@pytest.mark.parametrize("kind", [*OF_COUNTS, optim.SGD])
def test_more_parameters_take_no_more_operations_where_they_are_counted(kind, elsewhere) -> None:
    nums = []
    for num_parameters in (4, 12):
        taken = OfAges(kind, torch.float32, num_parameters)
        with Operations() as operations:
            taken.ahead()
        nums.append(operations.num)
    assert nums[0] == nums[1]


@pytest.mark.parametrize("rate", ["a number", "on the CPU", "on the device"])
@pytest.mark.parametrize("kind", RULES)
def test_nothing_is_asked_of_the_device(kind, rate: str) -> None:
    """The meta device has no values; a rate on the CPU goes with entries elsewhere."""
    taken = OfAges(kind, torch.float32, **({"momentum": 0.9} if kind is optim.SGD else {}))
    meta = torch.device("meta")
    parameters = [torch.nn.Parameter(p.detach().to(meta)) for p in taken.parameters]
    state = [taken.optimizer.state[p] for p in taken.parameters]
    taken.optimizer.state.clear()
    for p, held in zip(parameters, state, strict=True):
        moved = {name: v.to(meta) for name, v in held.items() if v is not None}
        taken.optimizer.state[p].update(moved)
    (group,) = taken.optimizer.param_groups
    group["params"] = taken.parameters = parameters
    group["lr"] = {
        "on the CPU": torch.tensor(0.1),
        "on the device": torch.ones((), device=meta),
    }.get(rate, 0.1)
    taken.gradients = [g.detach().to(meta).requires_grad_() for g in taken.gradients]
    for value in (*taken.slopes()[0], *taken.slopes()[1]):
        assert value.device == meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adamax])
def test_a_rate_in_a_tensor_is_the_number_in_it(kind, dtype) -> None:
    taken = OfAges(kind, dtype, foreach=False)
    (group,) = taken.optimizer.param_groups
    group["lr"] = 0.25
    with_number = taken.slopes()
    group["lr"] = torch.tensor(0.25, dtype=torch.float32)
    torch.testing.assert_close(taken.slopes(), with_number, rtol=0, atol=0)


def test_a_root_at_zero_has_no_slope() -> None:
    """It is not finite, for the pseudo update to find and count."""
    d = torch.zeros(2)
    group = {"betas": (0.9, 0.999), "eps": 1e-8}
    step, slope = RULES[optim.Adam](group, {}, lambda of: of(1), d)
    assert torch.equal(step, d)
    assert not slope.isfinite().any()


@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_a_rate_in_single_precision_rounds_the_decay_as_the_class_does(decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(9, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = optim.AdamW([p], lr=torch.tensor(0.05, dtype=torch.float32), weight_decay=decay)
    g = torch.randn_like(start)
    step = by_rule(optimizer, {id(p): g})
    p.grad = g
    optimizer.step()
    # Of 1 − α·decay, rounded to float32, an error of 6e-8 would be left.
    torch.testing.assert_close(step.values[id(p)], p.detach(), rtol=2e-9, atol=2e-9)
