"""Hooks of parameters: loggers see the real gradient once, and what changes it is in the step."""

import copy

import pytest
import torch
from torch import Tensor, nn

from reweight import MetaReweightStep, SampleReweighter
from reweight._passes.hooks import GradientHooks, HookChangesError

EVERY_WAY = [{}, {"lean": True}, {"lagged": True}, {"estimator": "unrolled"}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3) for _ in "ab"])
        self.norm = nn.BatchNorm1d(8)
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.norm(self.body(x)).tanh()
        return [head(hidden) for head in self.heads]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (10,), generator=generator)


def step_of(model: nn.Module, optimizer=torch.optim.SGD, **options) -> MetaReweightStep:
    torch.manual_seed(1)
    reweighter = SampleReweighter(num_exits=2).double()
    return MetaReweightStep(model, optimizer(model.parameters(), lr=0.1), reweighter, **options)


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_a_logger_sees_the_real_gradient_once(options) -> None:
    model, seen = Net(), []
    model.body.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    step = step_of(model, **options)
    for number in range(3):
        model.zero_grad()
        step.backward(batch(number), batch(number + 10))
        assert len(seen) == number + 1
        assert torch.equal(seen[-1], model.body.weight.grad)


MASK = torch.rand(8, 6, dtype=torch.float64).round()


def in_place(gradient: Tensor) -> None:
    gradient.mul_(MASK)


CHANGES = {"returned": lambda gradient: gradient * MASK, "in place": in_place}


class Later:
    """Changes the gradient from its third real call on, as a schedule would."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.on = model, False

    def __call__(self, gradient: Tensor) -> Tensor | None:
        return gradient * MASK if self.on else None


def trained(hook, begin: int, **options) -> MetaReweightStep:
    """Four accumulating calls; the hook belongs to the step from one of them on."""
    model = Net()
    switch = Later(model)
    model.body.weight.register_hook(lambda gradient: hook(gradient) if switch.on else None)
    step = step_of(model, **options)
    for number in range(4):
        switch.on = number >= begin
        step.backward(batch(number), batch(number + 10), scale=0.5)
        if number % 2:
            step.optimizers[0].step()
            model.zero_grad()
    return step


@pytest.mark.parametrize("begin", [0, 2, 3])
@pytest.mark.parametrize("hook", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("options", EVERY_WAY[:2], ids=str)
def test_one_that_changes_gradients_is_part_of_the_step(hook, begin: int, options) -> None:
    """From the call on in which it first does: bitwise as where it was known from the beginning."""
    found = trained(hook, begin, **options)
    wanted = _with_all_hooks_known(lambda: trained(hook, begin, **options))
    for one, other in ((found.model, wanted.model), (found.reweighter, wanted.reweighter)):
        for (name, value), expected in zip(
            one.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(value, expected), name
    without = trained(hook, 9, **options)
    assert not torch.equal(found.model.body.weight, without.model.body.weight)
    assert found.state_dict()["num_calls"] == found.state_dict()["num_updates"] == 4


def _with_all_hooks_known(run):
    """What runs with a look-ahead that calls every hook, as it was before any was left out."""
    left_out, GradientHooks.left_out = GradientHooks.left_out, _nothing_left_out
    try:
        return run()
    finally:
        GradientHooks.left_out = left_out


def _nothing_left_out(self, *, will_be_watched: bool):
    return left_out_of(self, will_be_watched=False)


left_out_of = GradientHooks.left_out


def test_a_call_that_begins_once_more_warns_of_nothing() -> None:
    """Adam is cold at its first step, which is no mistake; the second attempt is the same step."""
    model = Net()
    model.body.weight.register_hook(CHANGES["returned"])
    step = step_of(model, torch.optim.Adam)
    step.backward(batch(0), batch(1))
    assert step.state_dict()["num_calls"] == 1


def test_without_a_backward_to_watch_every_hook_is_called() -> None:
    """So that ``update_reweighter`` is exact from its first call on."""
    model = Net()
    model.body.weight.register_hook(CHANGES["returned"])
    step, other = step_of(model), step_of(copy.deepcopy(model))
    other.model.body.weight.register_hook(CHANGES["returned"])
    found = step.update_reweighter(batch(0), batch(1))
    wanted = other.backward(batch(0), batch(1))
    assert torch.equal(found.hypergradient_norm, wanted.hypergradient_norm)


def test_hooks_stay_where_they_are() -> None:
    parameter = nn.Parameter(torch.ones(2))
    model = nn.Module()
    model.weight = parameter
    handle = parameter.register_hook(lambda gradient: handle.remove())
    kept = parameter.register_hook(lambda gradient: 2 * gradient)
    own, hooks = dict(parameter._backward_hooks), GradientHooks(model)
    with hooks.left_out(will_be_watched=True):
        parameter.sum().backward()
    assert dict(parameter._backward_hooks) == own
    parameter.grad = None
    with pytest.raises(HookChangesError), hooks.watched(was_left_out=True):
        parameter.sum().backward()
    assert list(parameter._backward_hooks) == [kept.id], "one has removed itself"
    with hooks.left_out(will_be_watched=True):
        parameter.sum().backward()
    assert parameter.grad.tolist() == [4, 4], "the other is known"
