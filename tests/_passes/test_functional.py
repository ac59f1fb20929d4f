"""Other tensors in a model's places: all names of each, for one call, and its own back."""

import pytest
import torch
from torch import nn

from cases import make_batch, make_model
from reweight._passes.functional import run_with


class Shared(nn.Module):
    """One module by two names, and one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.again = self.first
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(self.again(self.first(x))))


def test_a_tensor_goes_to_every_place() -> None:
    model = Shared()
    weight, scale, mean = torch.ones(3, 3), torch.zeros(3), torch.full((3,), 5.0)
    given = {"one.weight": weight, "first.weight": scale, "first.running_mean": mean}

    def run() -> None:
        assert model.one.weight is model.other.weight is weight
        assert model.again.weight is scale
        assert model.again.running_mean is mean
        assert isinstance(model.first.bias, nn.Parameter)

    run_with(model, given, run)


@pytest.mark.parametrize("fails", [False, True])
def test_runs_with_them_and_has_its_own_back(fails: bool) -> None:
    model, x = Shared().double(), torch.randn(4, 3, dtype=torch.float64)
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in names.items()}
    other = Shared().double()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    given = dict(other.named_parameters())
    given |= {name: buffer.clone() for name, buffer in other.named_buffers()}

    def run() -> torch.Tensor:
        if fails:
            raise ArithmeticError
        return model(x)

    if fails:
        with pytest.raises(ArithmeticError):
            run_with(model, given, run)
    else:
        torch.testing.assert_close(run_with(model, given, run), other(x), rtol=1e-14, atol=0)
    assert model.again is model.first
    assert model.other.weight is model.one.weight
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is names[name]
        assert torch.equal(tensor, before[name])


def test_gradients_reach_what_was_given() -> None:
    model, (x, _) = make_model("tied"), make_batch("tied")
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    given = torch.stack(run_with(model, leaves, lambda: model(x))).square().sum()
    own = torch.stack(model(x)).square().sum()
    ours = torch.autograd.grad(given, list(leaves.values()))
    theirs = torch.autograd.grad(own, list(model.parameters()))
    assert all(map(torch.equal, ours, theirs))
