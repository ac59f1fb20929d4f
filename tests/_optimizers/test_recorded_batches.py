"""Parameters that are alike go through a step in batches, with what each would come to alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim

from properties import assert_same
from reweight._optimizers.pseudo_update import pseudo_update
from reweight._optimizers.recorded_batches import in_batches
from reweight._optimizers.recorded_step import How, recorded_step
from steps import GlobalNorm, MuonAndAdam, Noisy, TrustRatio

SHAPES = [*[(4, 3)] * 9, *[(3, 4)] * 5, *[(4,)] * 8, (5,)]


class Each(optim.Optimizer):
    """Does something to every parameter."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.move(p, p.grad)


class Turned(Each):
    """Views of what stands for a batch are read and written."""

    def move(self, p: Tensor, g: Tensor) -> None:
        columns = g.t().clone(memory_format=torch.preserve_format)
        columns[..., 1:3].mul_(2).add_(g.norm())
        columns.t()[0].mul_(5)
        p.sub_(columns.t() / columns.norm(dim=0, keepdim=True).t())


class Branches(Each):
    """One of which is not finite for those of the other."""

    def move(self, p: Tensor, g: Tensor) -> None:
        norm = g.norm().item()
        if norm > 0.3:
            p.sub_(g, alpha=0.1)
        elif 2 * norm < 0.5:
            p.sub_(g * (0.25 - g.norm()).sqrt())
        else:
            p.sub_(g * g, alpha=norm)


class Draws(Each):
    """Numbers of its own for each."""

    def move(self, p: Tensor, g: Tensor) -> None:
        p.sub_(g * torch.rand(tuple(p.shape), dtype=p.dtype))


class Constants(Each):
    """What Python makes of a number of each."""

    def move(self, p: Tensor, g: Tensor) -> None:
        p.sub_(g, alpha=float(p.norm()))


class StandsStillIfAnyIsLarge(Each):
    """So what becomes of one depends on another, though no tensors meet."""

    @torch.no_grad()
    def step(self) -> None:
        held = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for p in held:
            if p.grad.norm().item() > 0.5:
                return
        for p in held:
            p.sub_(p.grad * p.grad.norm())


class ByTurn(Each):
    """One after the other moves less."""

    @torch.no_grad()
    def step(self) -> None:
        for i, p in enumerate(p for p in self.param_groups[0]["params"] if p.grad is not None):
            p.sub_(p.grad * p.grad.norm(), alpha=0.5**i)


class Shared(Each):
    """A state that is of no parameter."""

    @torch.no_grad()
    def step(self) -> None:
        shared = self.state.setdefault("shared", {"mean": torch.full((3,), 0.5)})["mean"]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad * p.grad.norm() * shared.norm())


MAKE: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "adafactor": lambda held: optim.Adafactor(held, lr=0.1),
    "adafactor, foreach": lambda held: optim.Adafactor(
        [{"params": held[:8], "lr": 0.3}, {"params": held[8:]}], foreach=True
    ),
    "muon": lambda held: optim.Muon([p for p in held if p.dim() == 2], lr=0.1),
    "muon and adam": MuonAndAdam,
    "trust ratio": TrustRatio,
    "adam, fused, amsgrad": lambda held: optim.Adam(held, fused=True, amsgrad=True),
    "turned": lambda held: Turned([p for p in held if p.dim() == 2]),
    "branches": Branches,
}


def trained(
    make: Callable[[list[nn.Parameter]], optim.Optimizer], dtype: torch.dtype, num_steps: int
) -> tuple[optim.Optimizer, dict[int, Tensor]]:
    """After some steps, the last without one parameter; and the gradients of the next."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parameters = [nn.Parameter(drawn(shape)) for shape in SHAPES]
    optimizer = make(parameters)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(num_steps):
        for p in held:
            p.grad = None if i and p is held[1] else 0.1 * drawn(p.shape)
        optimizer.step()
    return optimizer, {id(p): (0.1 * drawn(p.shape)).requires_grad_() for p in held}


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MAKE)
def test_values_are_bitwise_those_of_each_alone_and_so_are_slopes(name, dtype, num_steps) -> None:
    optimizer, leaves = trained(MAKE[name], dtype, num_steps)
    before = optimizer.state_dict()
    moved, recorder = recorded_step(optimizer, leaves)
    found = in_batches(optimizer, leaves, How())
    assert found is not None
    assert_same(optimizer.state_dict(), before)
    assert found.keys() == moved.keys()
    assert all(torch.equal(found[key], moved[key]) for key in moved)
    cotangents = [torch.randn_like(value) for value in moved.values()]
    expected, slopes = (
        torch.autograd.grad([step[key] for key in moved], list(leaves.values()), cotangents)
        for step in (moved, found)
    )
    precision = torch.finfo(torch.float32 if recorder.is_widened else dtype).eps
    # A few hundred products and sums in another order, which cancel in some.
    allowed = 300 * precision * max(one.norm() for one in expected)
    for one, other in zip(expected, slopes, strict=True):
        assert (one - other).norm() <= allowed


@pytest.mark.parametrize(
    "make", [GlobalNorm, Noisy, Draws, Constants, StandsStillIfAnyIsLarge, ByTurn, Shared]
)
def test_what_is_not_the_same_for_all_of_a_batch_does_not_go_so(make) -> None:
    optimizer, leaves = trained(make, torch.float64, 2)
    with torch.no_grad():
        next(iter(leaves.values())).mul_(10)
    assert in_batches(optimizer, leaves, How()) is None


def test_few_of_each_kind_go_alone() -> None:
    optimizer, leaves = trained(TrustRatio, torch.float64, 0)
    few = dict(list(leaves.items())[5:8])
    assert in_batches(optimizer, few, How()) is None


def test_it_is_how_many_go_ever_after(monkeypatch) -> None:
    """Verified first; entries without derivative are cut and counted as without batches."""
    from reweight._optimizers import recorded_update

    optimizer, leaves = trained(MAKE["trust ratio"], torch.float64, 3)
    held = {str(i): p for i, p in enumerate(optimizer.param_groups[0]["params"])}
    named = {name: leaves[id(p)].detach().requires_grad_() for name, p in held.items()}
    named["0"].data.zero_()  # whose norm has no derivative, taken as 0
    results = []
    for is_allowed in (True, False):
        pseudo_update([optimizer], held, named)
        if not is_allowed:
            monkeypatch.setattr(recorded_update, "in_batches", lambda *args: None)
        update = pseudo_update([optimizer], held, named)
        moved = sum(new.sum() for new in update.parameters.values())
        results.append([*torch.autograd.grad(moved, list(named.values())), update.num_zero_moments])
    assert recorded_update._known[optimizer].how.in_batches
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
