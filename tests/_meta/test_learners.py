"""Direct weights through the step: from weights of 0, by every optimizer and every way."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cases import MODELS, UPDATE_RULES, conventional_loss, make_batch, make_model, warm_up, warmed
from properties import assert_same
from references import direct_weights_slowly, stock_hypergradient
from reweight import DirectWeights, ExitLosses, MetaReweightStep, exit_cross_entropy
from reweight._meta.learners import DirectLearner, learner_of
from reweight._meta.problem import Hypergradient
from reweight.objectives import MetaLoss


def make(model: nn.Module, optimizer: Optimizer, **options) -> MetaReweightStep:
    return MetaReweightStep(model, optimizer, DirectWeights(3), **options)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_the_hypergradient_is_that_at_weights_of_zero(rule: str) -> None:
    model, optimizer = warmed("mlp", UPDATE_RULES[rule], num_steps=8)
    train, meta = make_batch("mlp"), make_batch("mlp", seed=2)
    result = make(model, optimizer).update_reweighter(train, meta)
    zeros = torch.zeros(7, 3)
    expected = stock_hypergradient(model, optimizer, zeros, train, meta, conventional_loss)
    assert expected.norm() > 1e-8
    assert (result.hypergradient - expected).norm() < 1e-10 * expected.norm()
    assert result.backward_difference < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", ["forward", "unrolled", "finite_difference"])
@pytest.mark.parametrize("model_name", MODELS)
def test_the_gradient_is_that_of_weights_by_the_definition(model_name, estimator, dtype) -> None:
    model, train, meta = (
        make_model(model_name),
        make_batch(model_name),
        make_batch(model_name, 9, 2),
    )
    model = model.to(dtype)
    train, meta = ((x.to(dtype), y) for x, y in (train, meta))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm_up(model, optimizer, train)
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    result = make(model, optimizer, estimator=estimator).backward(train, meta)
    expected = direct_weights_slowly(result.hypergradient.double(), [True] * 7)
    torch.testing.assert_close(result.weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(result.weights.unique()) > 2
    torch.set_rng_state(state)
    losses = exit_cross_entropy(twin(train[0]), train[1])
    (result.weights * losses.losses).mean(0).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)


def test_estimators_agree_at_weights_of_zero() -> None:
    train, meta = make_batch("mlp"), make_batch("mlp", 9, 2)
    model, optimizer = warmed("mlp", UPDATE_RULES["adamw"])
    forward, unrolled, near = (
        make(model, optimizer, estimator=name).update_reweighter(train, meta).hypergradient
        for name in ("forward", "unrolled", "finite_difference")
    )
    assert (forward - unrolled).norm() < 1e-10 * unrolled.norm()
    assert (near - unrolled).norm() < 1e-4 * unrolled.norm()


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("options", [{}, {"lean": True}], ids=["", "lean"])
def test_lean_and_accumulated(options, accumulated: bool) -> None:
    """What stands in .grad is part of the step that is looked ahead to; weights are still of 0."""
    found = []
    for each in ({"estimator": "unrolled"}, options):
        train, meta = make_batch("mlp"), make_batch("mlp", 9, 2)
        model, optimizer = warmed("mlp", UPDATE_RULES["adamw"])
        if accumulated:
            conventional_loss(model(meta[0]), meta[1]).backward()
        result = make(model, optimizer, **each).backward(train, meta, scale=0.5)
        found.append([result.hypergradient, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    assert result.backward_difference < 1e-12


def test_rows_that_were_not_seen_have_weights_of_one() -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp", 12), make_batch("mlp", 9, 2)
    step = make(model, SGD(model.parameters(), lr=0.1), train_fraction=0.5)
    step.backward(train, meta)  # the first is of all rows, to be checked
    result = step.backward(train, meta)
    unseen = (result.hypergradient == 0).all(1)
    assert unseen.sum() == 6
    assert (result.weights[unseen] == 1).all()
    expected = direct_weights_slowly(result.hypergradient, [True] * 12)
    torch.testing.assert_close(result.weights, expected)
    assert (result.weights[~unseen].mean(0) <= 1 + 1e-12).all()


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_of_a_cold_adam_nothing_is_known_and_the_first_step_is_conventional(kind) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    step = make(model, kind(model.parameters(), lr=0.01))
    first = step(train, meta)
    assert torch.equal(first.weights, torch.ones_like(first.weights))
    assert first.num_zero_moments == sum(p.numel() for p in model.parameters())
    second = step(train, meta)
    assert len(second.weights.unique()) > 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_cold_sgd_knows_at_once(momentum: float) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    step = make(model, SGD(model.parameters(), lr=0.1, momentum=momentum))
    assert len(step(train, meta).weights.unique()) > 2


def test_a_batch_that_is_not_finite_has_weights_of_one_and_is_counted() -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    step = make(model, SGD(model.parameters(), lr=0.1))
    bad = meta[0].clone()
    bad[0] = torch.nan
    result = step.backward(train, (bad, meta[1]))
    assert torch.equal(result.weights, torch.ones_like(result.weights))
    assert step.num_skipped == 1
    assert "non-finite meta loss, hypergradient" in result.summary()


def test_scaled_gradients_have_the_same_weights() -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
        step = make(model, SGD(model.parameters(), lr=0.1), scaler=scaler)
        found.append(step.backward(train, meta).weights)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_check_of_both_ways_is_not_blind_at_weights_of_zero(wrong: bool) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    if wrong:
        model.blocks[1].register_full_backward_hook(lambda m, gi, go: (3 * gi[0],))
    step = make(model, SGD(model.parameters(), lr=0.1))
    warned = pytest.warns(UserWarning, match="do not agree with the backward")
    with warned if wrong else nullcontext():
        step.update_reweighter(train, meta)
        step.update_reweighter(train, meta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lagged": True},
            "lagged=True must be left out with DirectWeights: a step",
        ),
        ({"interval": 2}, "`interval` must be left out with DirectWeights: a batch that is not"),
        ({"clip_hypergradient": 1.0}, "`clip_hypergradient` must be left out"),
        ({"reweighter_optimizer": SGD([torch.ones(1)], lr=1.0)}, "`reweighter_optimizer` must be"),
    ],
)
def test_what_cannot_be_with_direct_weights_says_why(options, message) -> None:
    model = make_model("mlp")
    with pytest.raises(ValueError, match=message):
        make(model, SGD(model.parameters(), lr=0.1), **options)


def test_a_step_goes_on_from_its_state() -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    step = make(model, SGD(model.parameters(), lr=0.1))
    step.backward(train, meta)
    other = make(model, SGD(model.parameters(), lr=0.1))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert_same(other.state_dict(), step.state_dict())
    assert step.state_dict()["num_updates"] == 1


def test_undo_takes_the_count_back() -> None:
    learner = learner_of(DirectWeights(2), None, 1, None, lagged=False)
    assert isinstance(learner, DirectLearner)
    losses = ExitLosses(torch.rand(3, 2))
    meta = MetaLoss(torch.tensor(torch.nan), torch.ones(2))
    update = learner.learn(losses, learner.ahead(losses), Hypergradient(torch.rand(3, 2), meta, 0))
    assert (learner.num_updates, int(learner.num_skipped)) == (1, 1)
    update.undo()
    assert (learner.num_updates, int(learner.num_skipped)) == (0, 0)
