"""What the look-ahead moves, what it refuses, and what it keeps of a step that waits."""

import copy

import pytest
import torch
from torch.optim import SGD

from cases import make_batch, make_model
from reweight import MeanObjective, exit_cross_entropy
from reweight._meta.lookahead import Lookahead
from reweight._meta.problem import FirstForward, gradients_of
from reweight._passes.forward import ExitForward
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.snapshots import Beginning


def make(model=None, **options) -> Lookahead:
    model = model or make_model("mlp")
    given = {
        "optimizers": (SGD(model.parameters(), lr=0.1, momentum=0.9),),
        "objective": MeanObjective(),
        "exactness": "exact",
        "clip_grad_norm": None,
        "scaler": None,
        "train_fraction": 1.0,
        "moves": None,
    }
    forward = ExitForward(model, model, None, exit_cross_entropy)
    return Lookahead(model, forward, **(given | options))


def first_forward(lookahead: Lookahead) -> FirstForward:
    """After its backward: the gradients are in ``.grad``."""
    batch, model = make_batch("mlp"), lookahead.model
    beginning, cache = Beginning(model), PrimalCache()
    losses = lookahead.forward(*batch, beginning=beginning, within=cache)
    losses.losses.mean(0).sum().backward(retain_graph=True)
    shares = torch.full((7, 1), 1 / 7, dtype=torch.float64)
    gradients = gradients_of(lookahead.held())
    return FirstForward(
        batch, beginning, losses, cache, lookahead.moved(), {}, shares, True, gradients
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exactness": "nearly"}, ValueError, "`pseudo_update` must be one of exact, grad"),
        ({"clip_grad_norm": 0}, ValueError, "`clip_grad_norm` must be positive"),
        ({"train_fraction": 0}, ValueError, r"`train_fraction` must lie in \(0, 1\]"),
        ({"scaler": 2.0}, TypeError, "`scaler` must be a GradScaler"),
        ({"objective": "mean"}, TypeError, "`objective` must be a function"),
        ({"moves": lambda name: False}, ValueError, "`moves` must choose a parameter"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_of_what_is_held_the_choice_is_moved() -> None:
    lookahead = make(moves=lambda name: name.startswith("exits.1"))
    assert set(lookahead.moved()) == {"exits.1.weight", "exits.1.bias"}
    assert lookahead.held().keys() == dict(lookahead.model.named_parameters()).keys()
    lookahead.model.requires_grad_(False)
    with pytest.raises(ValueError, match="Move and freeze the model first"):
        lookahead.moved()


def test_the_seed_draws_the_rows() -> None:
    lookahead = make(train_fraction=0.5)
    first, meta = first_forward(lookahead), make_batch("mlp", seed=2)
    weights = torch.ones(7, 3, dtype=torch.float64)
    after = Beginning(lookahead.model)
    rows = [lookahead.problem(first, after, meta, weights, seed).rows for seed in (1, 1, 2, 3)]
    assert all(len(each) == len(set(each.tolist())) == 4 for each in rows)
    assert torch.equal(rows[0], rows[1])
    assert any(not torch.equal(rows[0], each) for each in rows[2:])
    assert lookahead.problem(first, after, meta, weights, 64).rows is None  # to check them all
    assert make().problem(first, after, meta, weights, 1).rows is None


def test_a_step_that_waits_is_the_one_that_is_taken_whatever_comes_after() -> None:
    lookahead = make()
    first = first_forward(lookahead)
    before = {name: p.detach().clone() for name, p in lookahead.held().items()}
    waiting = lookahead.postponed(first, torch.ones(7, 3, dtype=torch.float64))
    lookahead.optimizers[0].step()
    lookahead.optimizers[0].zero_grad(set_to_none=False)  # in place
    for name, parameter in lookahead.model.named_parameters():
        torch.testing.assert_close(
            waiting.ahead.parameters[name].detach(), parameter.detach(), rtol=1e-12, atol=1e-15
        )
        assert torch.equal(waiting.before[name], before[name])
        assert waiting.gradients[name].abs().sum() > 0


def test_what_waits_is_given_up_by_copies_and_by_freezing() -> None:
    lookahead = make()
    weights = torch.ones(7, 3, dtype=torch.float64)
    lookahead.waiting = lookahead.postponed(first_forward(lookahead), weights)
    assert lookahead.still_waiting() is lookahead.waiting
    assert copy.deepcopy(lookahead).waiting is None
    lookahead.model.exits[0].bias.requires_grad_(False)
    assert lookahead.still_waiting() is None
