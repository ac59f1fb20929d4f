"""A step that is taken or not, bitwise, whatever state its optimizer keeps."""

import copy

import pytest
import torch
from torch.optim import SGD, Adam

from properties import assert_same
from reweight._meta import guarded_step
from reweight._meta.guarded_step import Snapshot, step_where


class Counted(SGD):
    """Keeps a number in its groups."""

    def step(self) -> None:
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


@pytest.mark.parametrize("is_asked", [True, False])
def test_what_groups_hold_comes_back_where_it_can_be_asked_for(is_asked, monkeypatch) -> None:
    if not is_asked:  # as on a GPU
        monkeypatch.setattr(guarded_step, "_step_if", guarded_step._step_and_undo)
    parameter = torch.ones(2, requires_grad=True)
    optimizer = Counted([parameter], lr=0.1)
    optimizer.param_groups[0]["k"] = 3
    snapshot = Snapshot(optimizer)
    parameter.grad = torch.tensor([torch.inf, 0.2])
    assert not step_where(optimizer, torch.tensor(True), snapshot)
    assert optimizer.param_groups[0]["k"] == (3 if is_asked else 4)
    assert parameter.tolist() == [1, 1]


@pytest.mark.parametrize("is_asked", [True, False])
@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        Adam,
        lambda p: Adam(p, fused=True),
        lambda p: SGD(p, lr=0.1),
        lambda p: SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_step_where_steps_or_changes_nothing(
    make, num_steps: int, is_asked: bool, monkeypatch
) -> None:
    if not is_asked:  # as on a GPU
        monkeypatch.setattr(guarded_step, "_step_if", guarded_step._step_and_undo)

    def fresh():
        parameter = torch.tensor([1.0, 2.0], requires_grad=True)
        optimizer = make([parameter, torch.ones(2, 3, requires_grad=True)])
        for _ in range(num_steps):
            for each in optimizer.param_groups[0]["params"]:
                each.grad = torch.full_like(each, 0.5)
            optimizer.step()
        return parameter, optimizer

    (stepped, optimizer), (expected, plain) = fresh(), fresh()
    stepped.grad, expected.grad = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2])
    step_where(optimizer, torch.tensor(True), Snapshot(optimizer))
    plain.step()
    assert torch.equal(stepped, expected)
    assert_same(optimizer.state_dict(), plain.state_dict())

    kept, optimizer = fresh()
    before = kept.detach().clone()
    state_before = copy.deepcopy(optimizer.state_dict())
    kept.grad = torch.tensor([torch.nan, 0.2])
    snapshot = Snapshot(optimizer)
    step_where(optimizer, torch.tensor(False), snapshot)
    assert torch.equal(kept, before)
    assert kept.grad is None
    if num_steps:
        assert_same(optimizer.state_dict(), state_before)
    snapshot.restore()  # the state too that the step has made
    assert_same(optimizer.state_dict(), state_before)
