"""Steps that go entry by entry: many parameters as one, with values and slopes as without."""

import pytest
import torch
from torch import nn, optim

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


@pytest.mark.parametrize("make", [TrustRatio, GlobalNorm, BySize])
def test_others_do_not_go_so(make: Make) -> None:
    taken = Taken(make)
    assert entry_by_entry(taken.optimizer, leaves_of(taken), How()) is None
