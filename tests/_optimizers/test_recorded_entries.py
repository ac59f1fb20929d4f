"""Steps that go entry by entry: many parameters as one, with values and slopes as without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from ages import OfAges, Operations
from reweight._optimizers.recorded_entries import entry_by_entry
from reweight._optimizers.recorded_step import How, recorded_step
from steps import GlobalNorm, Make, Taken, TrustRatio


class BySize(TrustRatio):
    """Each entry for itself, at a rate that the size of the parameter gives."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1 / p.shape[0])


def leaves_of(taken: Taken) -> dict[int, torch.Tensor]:
    return {
        id(p): g.clone().requires_grad_()
        for p, g in zip(taken.parameters, taken.gradients, strict=True)
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["Adam", "NAdam", "ASGD", "SGD", "RMSprop"])
def test_values_and_slopes_are_those_of_each_alone(name: str, foreach: bool, dtype) -> None:
    taken = Taken(lambda p: getattr(optim, name)(p, lr=0.1, foreach=foreach), dtype)
    leaves = leaves_of(taken)
    moved, recorder = recorded_step(taken.optimizer, leaves)
    found = entry_by_entry(taken.optimizer, leaves, How())
    assert recorder.is_entrywise
    assert found is not None
    slopes = torch.autograd.grad(sum(m.sum() for m in moved.values()), list(leaves.values()))
    for key, slope in zip(leaves, slopes, strict=True):
        assert torch.equal(found.values[key], moved[key])
        off = (found.slopes[key] - slope).norm()  # it rounds in another order
        assert off <= 16 * torch.finfo(dtype).eps * slope.norm()


def test_parameters_of_different_age_and_large_ones_go_apart() -> None:
    large = nn.Parameter(torch.randn(100, 100))
    small = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    optimizer = optim.NAdam([large, *small])
    for p in (large, *small[:2]):
        p.grad = torch.randn_like(p)
    optimizer.step()
    leaves = {id(p): torch.randn_like(p).requires_grad_() for p in (large, *small)}
    found = entry_by_entry(optimizer, leaves, How())
    assert found is not None
    for key, value in recorded_step(optimizer, leaves).parameters.items():
        assert torch.equal(found.values[key], value)


COUNTED: dict[str, dict[str, Any]] = {
    "NAdam": {},
    "Adadelta": {},
    "ASGD": {},
    "RMSprop": {},
    "Adam": {"amsgrad": True},
}


def of_ages(name: str, dtype: torch.dtype, foreach: bool, num: int = 8, **options: Any) -> OfAges:
    options = {"foreach": foreach, "capturable": True, **COUNTED.get(name, {}), **options}
    return OfAges(getattr(optim, name), dtype, num, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_each_parameter_has_its_own_numbers_where_they_are_on_the_device(
    name: str, foreach: bool, dtype, elsewhere
) -> None:
    taken = of_ages(name, dtype, foreach)
    leaves = {id(p): g for p, g in zip(taken.parameters, taken.gradients, strict=True)}
    found = entry_by_entry(taken.optimizer, leaves, How())
    moved, _ = recorded_step(taken.optimizer, leaves)
    assert found is not None
    slopes = torch.autograd.grad(sum(m.sum() for m in moved.values()), taken.gradients)
    eps = torch.finfo(dtype).eps
    for p, slope, own in zip(taken.parameters, slopes, taken.own(), strict=True):
        # Powers of several numbers at once round otherwise on a processor.
        assert (found.values[id(p)] - own).norm() <= eps * own.norm()
        assert (found.slopes[id(p)] - slope).norm() <= 16 * eps * slope.norm()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_more_parameters_take_no_more_operations_where_they_are_counted(
    name: str, foreach: bool, elsewhere
) -> None:
    nums = []
    for num_parameters in (4, 12):
        taken = of_ages(name, torch.float32, foreach, num_parameters)
        leaves = {id(p): g for p, g in zip(taken.parameters, taken.gradients, strict=True)}
        with Operations() as operations:
            assert entry_by_entry(taken.optimizer, leaves, How()) is not None
        nums.append(operations.num)
    assert nums[0] == nums[1]


class ByCount(optim.Optimizer):
    """What it does depends on a count, asked for in one way or another."""

    def __init__(self, params: Any, lr: float, decide: Callable[[Tensor], float]) -> None:
        super().__init__(params, {"lr": lr})
        self._decide = decide

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                step = self.state[p].setdefault("step", torch.zeros(()))
                step += 1
                p.sub_(p.grad, alpha=self._decide(step))


@pytest.mark.parametrize("module", ["torch.optim.by_count", "others"])
@pytest.mark.parametrize(
    "decide",
    [
        lambda step: 1 / step.item(),
        lambda step: float(step) / 8,
        lambda step: 0.1 if step > 6 else 0.2,
    ],
)
def test_numbers_that_are_asked_for_are_of_each_parameter(
    decide, module, elsewhere, monkeypatch
) -> None:
    monkeypatch.setattr(ByCount, "__module__", module)
    taken = OfAges(ByCount, torch.float64, decide=decide)
    leaves = {id(p): g for p, g in zip(taken.parameters, taken.gradients, strict=True)}
    found = entry_by_entry(taken.optimizer, leaves, How())
    assert found is not None
    for p, own in zip(taken.parameters, taken.own(), strict=True):
        assert torch.equal(found.values[id(p)], own)


@pytest.mark.parametrize("make", [TrustRatio, GlobalNorm, BySize])
def test_others_do_not_go_so(make: Make) -> None:
    taken = Taken(make)
    assert entry_by_entry(taken.optimizer, leaves_of(taken), How()) is None
