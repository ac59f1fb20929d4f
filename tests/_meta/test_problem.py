"""One meta step as functions of the parameters: each against the same written out."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from cases import make_batch, make_model
from reweight import MeanObjective, exit_cross_entropy
from reweight._meta.problem import (
    FirstForward,
    MetaProblem,
    dense,
    gradients_of,
    leaves,
    relative_difference,
)
from reweight._optimizers.pseudo_update import pseudo_update
from reweight._passes.forward import ExitForward
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.snapshots import Beginning


def make(name: str = "conv_batch_norm", rows=None, grad_scale=None) -> MetaProblem:
    model, batch = make_model(name), make_batch(name, 6)
    optimizer = SGD(model.parameters(), lr=0.1)
    forward = ExitForward(model, model, None, exit_cross_entropy)
    moved = dict(model.named_parameters())
    beginning, cache = Beginning(model), PrimalCache()
    losses = forward(*batch, beginning=beginning, within=cache)
    after, shares = Beginning(model), torch.full((6, 1), 1 / 6, dtype=torch.float64)
    first = FirstForward(batch, beginning, losses, cache, moved, {}, shares, keep_graph=True)
    weights = torch.rand(6, 3, dtype=torch.float64) + 0.5
    update = partial(pseudo_update, (optimizer,), moved)
    meta, objective = make_batch(name, 5, seed=2), MeanObjective()
    return MetaProblem(
        forward, model, objective, first, after, rows, meta, weights, update, grad_scale
    )


def test_train_gradients_are_those_of_the_weighted_losses() -> None:
    for grad_scale in (None, torch.tensor(1024.0, dtype=torch.float64)):
        problem = make(grad_scale=grad_scale)
        losses = problem.first.losses.losses
        total = (problem.weights * losses).mean(0).sum()
        names, parameters = zip(*problem.first.moved.items(), strict=True)
        expected = torch.autograd.grad(total, parameters, retain_graph=True)
        found = problem.train_gradients(problem.weights)
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
        # What was accumulated before the call is part of the step.
        held = {names[0]: torch.ones_like(parameters[0])}
        problem.first = problem.first._replace(accumulated=held)
        added = problem.train_gradients(problem.weights)[names[0]] - found[names[0]]
        scale = 1 if grad_scale is None else grad_scale
        torch.testing.assert_close(added * scale, held[names[0]], rtol=1e-9, atol=1e-9)


def test_the_look_ahead_is_the_step_that_the_optimizer_takes() -> None:
    problem = make()
    ahead = problem.look_ahead()
    for name, parameter in problem.first.moved.items():
        expected = parameter.detach() - 0.1 * ahead.gradients[name].detach()
        torch.testing.assert_close(ahead.parameters[name].detach(), expected, rtol=1e-12, atol=0)
        assert ahead.gradients[name].is_leaf


@pytest.mark.parametrize("name", ["conv_batch_norm", "transformer_dropout"])
def test_a_replay_begins_where_the_first_forward_did_and_leaves_no_trace(name: str) -> None:
    """Dropout draws the same masks, BatchNorm moves copies of its statistics."""
    problem = make(name)
    buffers = [b.clone() for b in problem.model.buffers()]
    close = {"rtol": 1e-12, "atol": 1e-12}
    with torch.no_grad():
        again = problem.replay({}, {}, nullcontext())
        torch.testing.assert_close(again, problem.first.losses.losses, **close)
        bias = next(n for n in problem.first.moved if n.startswith("exits.0") and "bias" in n)
        higher = torch.tensor([1.0, 0, 0, 0]).double()
        at = {bias: problem.first.moved[bias].detach() + higher}
        elsewhere = problem.replay(at, {}, nullcontext())
    assert not torch.allclose(elsewhere[:, 0], again[:, 0])
    torch.testing.assert_close(elsewhere[:, 1:], again[:, 1:], **close)
    assert all(map(torch.equal, buffers, problem.model.buffers()))


def test_the_meta_loss_is_that_of_the_updated_model() -> None:
    problem = make("mlp")
    updated = leaves(problem.look_ahead().parameters)
    meta_loss, gradients = problem.meta_loss(
        updated,
        lambda found, holders: torch.autograd.grad(found.value, list(holders.values())),
    )
    inputs, target = problem.meta
    logits = torch.func.functional_call(problem.model, updated, (inputs,))
    expected = sum(F.cross_entropy(z, target) for z in logits)
    torch.testing.assert_close(meta_loss.value, expected, rtol=1e-12, atol=0)
    slopes = torch.autograd.grad(expected, list(updated.values()))
    for ours, theirs in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_the_mean_of_what_rows_are_spread_to_is_the_product_of_all() -> None:
    product = torch.randn(6, 3, dtype=torch.float64)
    assert make().spread(product) is product
    pairs = torch.combinations(torch.arange(6), 2)  # every draw of two rows, each as often
    spread = torch.stack([make("mlp", rows=rows).spread(product[rows]) for rows in pairs])
    torch.testing.assert_close(spread.mean(0), product, rtol=1e-12, atol=1e-14)


def test_parameters_that_no_loss_depends_on_are_named() -> None:
    problem = make("mlp")
    unused = {"unused": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    problem.first = problem.first._replace(moved=unused)
    with pytest.raises(ValueError, match="must hold a parameter that the losses depend on"):
        problem.train_gradients(problem.weights)


def test_gradients_are_taken_dense_and_only_where_there_are_some() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    parameters = {"weight": embedding.weight, "other": torch.ones(2, requires_grad=True)}
    found = gradients_of(parameters)
    assert set(found) == {"weight"}
    assert found["weight"].tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert dense(found["weight"]) is found["weight"]


def test_relative_difference_of_the_parts_of_ranks() -> None:
    parts = torch.tensor([[-1.0, 4.0], [2.0, 4.0]])
    assert relative_difference(parts.sum(0)) == 1 / 8
    assert relative_difference(torch.zeros(2)) == 0
