"""What is wrong is found where an optimizer is used first, and only what is new is looked at."""

from typing import ClassVar

import pytest
import torch
from torch import nn, optim

from reweight._optimizers import recorded_update, verification
from reweight._optimizers.pseudo_update import pseudo_update
from reweight._optimizers.recorded_step import How
from reweight._optimizers.verification import kinds, verify
from steps import STEPS, Taken, TrustRatio


def gradients_of(taken: Taken) -> dict[int, torch.Tensor]:
    return {id(p): g for p, g in zip(taken.parameters, taken.gradients, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STEPS)
def test_what_is_right_passes(name: str, dtype: torch.dtype) -> None:
    taken = Taken(STEPS[name], dtype)
    verified = verify(taken.optimizer, gradients_of(taken))
    assert verified.moves
    assert verified.how == How()
    assert recorded_update.faster(verified).by_entries == (name == "schedule-free")


class Sneaky(TrustRatio):
    """Keeps something where nobody looks."""

    calls: ClassVar[list[int]] = [0]

    @torch.no_grad()
    def step(self) -> None:
        self.calls[0] += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * self.calls[0])


def test_other_values_are_found() -> None:
    taken = Taken(Sneaky, num_steps=0)
    with pytest.raises(TypeError, match="its step gives other parameters, by"):
        verify(taken.optimizer, gradients_of(taken))


class Jumps(TrustRatio):
    """Has a derivative that differences do not have."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad + 10 * torch.remainder(p.grad * 1e7, 1))


def test_another_derivative_is_found() -> None:
    taken = Taken(Jumps, num_steps=0)
    with pytest.raises(TypeError, match="in which differences give"):
        verify(taken.optimizer, gradients_of(taken))


class Signs(TrustRatio):
    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.param_groups[0]["lr"] * p.grad.sign())


def test_signs_have_no_derivative_however_large_the_step() -> None:
    taken = Taken(Signs, num_steps=0)
    with pytest.raises(TypeError, match="follows the signs of the gradient alone"):
        verify(taken.optimizer, gradients_of(taken))


def test_a_step_that_stands_still_is_looked_at_again() -> None:
    taken = Taken(Signs, num_steps=0)
    group = taken.optimizer.param_groups[0]
    group["lr"] = 0.0
    pseudo_update([taken.optimizer], taken.named, taken.leaves())
    group["lr"] = 0.1
    with pytest.raises(TypeError, match="follows the signs"):
        pseudo_update([taken.optimizer], taken.named, taken.leaves())


class ForgetsTheGradient(TrustRatio):
    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.mul_(0.9)


def test_a_step_that_does_not_look_at_the_gradient_is_refused() -> None:
    taken = Taken(ForgetsTheGradient, num_steps=0)
    with pytest.raises(TypeError, match="does not depend on the gradient"):
        verify(taken.optimizer, gradients_of(taken))


class KnowsItsTypes(TrustRatio):
    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            assert p.dtype is torch.float32
            p.sub_(0.1 * p.grad**2)


def test_code_for_one_precision_is_verified_in_that() -> None:
    taken = Taken(KnowsItsTypes, torch.float32, num_steps=0)
    assert verify(taken.optimizer, gradients_of(taken)).how == How()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    calls: list[set[int]] = []

    def spy(optimizer, gradients):
        calls.append({key for key, g in gradients.items() if g is not None})
        return verify(optimizer, gradients)

    monkeypatch.setattr(recorded_update, "verify", spy)
    return calls


def test_once_for_each_kind_of_parameter_and_setting(monkeypatch) -> None:
    calls = counted(monkeypatch)
    taken = Taken(lambda parameters: optim.NAdam(parameters, lr=0.01), num_steps=0)

    def look(number: int) -> None:
        pseudo_update([taken.optimizer], taken.named, taken.leaves())
        assert len(calls) == number

    look(1)
    look(1)
    taken.step(taken.gradients)  # there is state now
    look(2)
    taken.step(taken.gradients)
    taken.optimizer.param_groups[0]["lr"] = 0.3  # a scheduler's doing
    look(2)
    taken.optimizer.param_groups[0]["maximize"] = True
    look(3)
    taken.optimizer.__class__ = type("Other", (optim.NAdam,), {})
    look(4)


def test_large_models_are_verified_by_the_smallest_of_each_kind(monkeypatch) -> None:
    monkeypatch.setattr(verification, "_ENTRIES", 5)
    shapes = [(3,), (4,), (5,), (2, 2), (8, 8)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = optim.NAdam(parameters)
    gradients = {id(p): 1 + torch.rand_like(p) for p in parameters}
    assert sorted(kinds(optimizer, gradients).values()) == sorted(map(id, parameters[::3]))
    few, some = verification._few(optimizer, gradients)
    held = [p for group in few.param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in held] == [(3,), (2, 2)]
    assert some.keys() == set(map(id, held))
    assert len(optimizer.param_groups[0]["params"]) == 5
    verify(optimizer, gradients)
