"""What a hypergradient makes of the reweighter."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from properties import assert_same
from reweight import ExitLosses, SampleReweighter
from reweight._meta.learner import ReweighterLearner
from reweight._meta.problem import Hypergradient
from reweight.objectives import MetaLoss


def make(reweighter: nn.Module, optimizer=None, interval=1, clip=None) -> ReweighterLearner:
    return ReweighterLearner(reweighter, optimizer, interval, clip)


@pytest.mark.parametrize(
    ("form", "interval", "lr"),
    [
        ("tanh", 1, 1e-4),
        ("tanh", 100, 1e-4),
        ("sigmoid", 1, 1e-3),
        ("sigmoid", 5, 5e-3),
        ("sigmoid", 10, 1e-2),
        ("sigmoid", 100, 1e-2),
    ],
)
def test_the_reweighter_learns_at_a_rate_that_suits_its_interval(form, interval, lr) -> None:
    learner = make(SampleReweighter(3, form=form), interval=interval)
    (group,) = learner.optimizer.param_groups
    assert group["lr"] == pytest.approx(lr)
    assert group["weight_decay"] == 1e-4
    assert type(learner.optimizer) is AdamW


def learn(learner: ReweighterLearner, losses: Tensor, value: Tensor, meta_loss: float = 1.5):
    """One update from this ∂L_meta/∂w."""
    exit_losses = ExitLosses(losses)
    meta = MetaLoss(torch.tensor(meta_loss).double(), torch.tensor([0.4, 0.6]))
    weights = learner.ahead(exit_losses)
    return learner.learn(exit_losses, weights, Hypergradient(value, meta, 0))


def set_up(**options):
    reweighter = SampleReweighter(2, num_hidden=4).double()
    learner = make(reweighter, SGD(reweighter.parameters(), lr=0.5, momentum=0.9), **options)
    losses, value = (torch.randn(6, 2, dtype=torch.float64) for _ in range(2))
    return learner, losses.abs(), value


@pytest.mark.parametrize("clip", [None, 0.1])
def test_goes_down_the_hypergradient_through_the_reweighter(clip: float | None) -> None:
    learner, losses, value = set_up(clip=clip)
    before = [p.detach().clone() for p in learner.reweighter.parameters()]
    passed_on = value if clip is None else value * clip / value.norm()
    objective = (learner.reweighter(losses) * passed_on).sum()
    expected = torch.autograd.grad(objective, list(learner.reweighter.parameters()))
    update = learn(learner, losses, value)
    for p, old, slope in zip(learner.reweighter.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * slope, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(update.hypergradient_norm, value.norm())
    assert update.meta_loss.value == 1.5
    assert (learner.num_updates, int(learner.num_skipped)) == (1, 0)


@pytest.mark.parametrize("num_before", [0, 2])
def test_undo_puts_everything_back(num_before: int) -> None:
    learner, losses, value = set_up()
    for _ in range(num_before):
        learn(learner, losses, value)
    before = copy.deepcopy(learner.state_dict())
    learn(learner, losses, value).undo()
    assert_same(learner.state_dict(), before)


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize("bad", ["losses", "meta loss", "hypergradient", "reweighter"])
def test_what_is_not_finite_is_told_and_learned_nothing_from(bad: str, num_before: int) -> None:
    learner, losses, value = set_up()
    for _ in range(num_before):
        learn(learner, losses, value)
    before = copy.deepcopy(learner.state_dict())
    spoilt = value.clone()
    if bad == "hypergradient":
        spoilt[3, 1] = torch.inf
    if bad == "reweighter":  # all finite, but a step too far
        spoilt *= 1e308 / spoilt.abs().max()
        learner.optimizer.param_groups[0]["lr"] = 1e10
    if bad == "losses":
        losses = losses.clone()
        losses[0, 0] = torch.nan
    update = learn(learner, losses, spoilt, torch.nan if bad == "meta loss" else 1.5)
    names = ["losses", "meta loss", "hypergradient", "reweighter"]
    assert update.nonfinite.tolist() == [name == bad for name in names]
    assert int(learner.num_skipped) == 1
    after = learner.state_dict()
    assert_same(after["reweighter"], before["reweighter"])
    assert_same(after["reweighter_optimizer"]["state"], before["reweighter_optimizer"]["state"])


def test_every_interval_th_call_is_one_to_learn_from() -> None:
    learner = make(SampleReweighter(2), interval=3)
    due = []
    for calls in range(5):
        learner.num_calls = calls
        due.append(learner.is_due)
    assert due == [True, False, False, True, False]
    learner.reweighter.requires_grad_(False)
    assert not learner.is_due
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        learner.require_trainable()


def test_a_state_goes_to_a_learner_of_the_same_kind_alone() -> None:
    learner, losses, value = set_up()
    learn(learner, losses, value)
    twin, _, _ = set_up()
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert_same(twin.state_dict(), learner.state_dict())
    for each in (learner, twin):
        learn(each, losses, value)
    assert_same(twin.state_dict(), learner.state_dict())
    other = make(SampleReweighter(2, num_hidden=4).double())  # by AdamW
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="must be of this reweighter and optimizer"):
        other.load_state_dict(learner.state_dict())
    assert_same(other.state_dict(), before)
