"""Weights that depend on labels and features, through every way that a step can go."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from cases import OPTIMIZERS, conventional_loss, make_batch, make_model, warm_up
from properties import assert_same
from references import budgeted_loss_slowly, meta_objective, numerical_slopes
from reweight import (
    ExitLosses,
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
)


def sums(inputs: Tensor, target: Tensor) -> Tensor:
    """Two numbers of each sample: one of its inputs, one of its label."""
    return torch.stack([inputs.flatten(1).sum(1), target.double() ** 2], 1)


class Seeing(nn.Module):
    """A reweighter that is given the labels and features of a batch by hand."""

    def __init__(self, reweighter: SampleReweighter, batch: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.reweighter, self.labels, self.features = reweighter, batch[1], sums(*batch)

    def forward(self, losses: Tensor) -> Tensor:
        return self.reweighter(ExitLosses(losses, labels=self.labels, features=self.features))


def make(form: str = "tanh", num_exits: int = 3, **options) -> SampleReweighter:
    torch.manual_seed(4)
    seen = {"num_classes": 4, "num_features": 2}
    return SampleReweighter(num_exits, form=form, num_hidden=3, **seen, **options).double()


def step_of(model: nn.Module, reweighter: nn.Module, optimizer=None, **options) -> MetaReweightStep:
    return MetaReweightStep(
        model,
        optimizer or SGD(model.parameters(), lr=0.1),
        reweighter,
        reweighter_optimizer=SGD(reweighter.parameters(), lr=1.0),
        features=sums,
        **options,
    )


@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
@pytest.mark.parametrize("optimizer_name", ["sgd_nesterov_two_groups", "adam"])
@pytest.mark.parametrize("model_name", ["mlp", "transformer_dropout"])
def test_the_reweighter_goes_down_the_meta_loss(model_name, optimizer_name, form):
    model, reweighter = make_model(model_name), make(form)
    optimizer = OPTIMIZERS[optimizer_name](model)
    train, meta = make_batch(model_name, seed=1), make_batch(model_name, 9, seed=2)
    warm_up(model, optimizer, train)
    judge = partial(budgeted_loss_slowly, power=0.75)
    seeing = Seeing(reweighter, train)
    objective = partial(meta_objective, model, optimizer, seeing, train, meta, judge)
    directions, slopes = numerical_slopes(objective, list(reweighter.parameters()))
    for estimator in ("forward", "unrolled"):
        taught = copy.deepcopy(reweighter)
        step = step_of(model, taught, optimizer, estimator=estimator)
        step.update_reweighter(train, meta)
        pairs = zip(reweighter.parameters(), taught.parameters(), strict=True)
        taken = torch.cat([(old - new).detach().flatten() for old, new in pairs])
        assert taken.norm() > 1e-8
        # Central differences at 1e-4: the third derivative leaves up to 1e-6 of relative error.
        assert (directions @ taken - slopes).norm() < 1e-5 * taken.norm(), estimator


WAYS = {
    "backward": {},
    "lean": {"lean": True},
    "interval": {"interval": 2},
    "lagged": {"lagged": True},
    "train_fraction": {"train_fraction": 0.5},
    "finite_difference": {"estimator": "finite_difference"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_gradient_is_that_of_the_weights_reported_and_these_see_the_label(options, dtype):
    model, reweighter = make_model("mlp").to(dtype), make("sigmoid").to(dtype)
    train, meta = make_batch("mlp"), make_batch("mlp", 9, 2)
    train, meta = ((x.to(dtype), y) for x, y in (train, meta))
    step = step_of(model, reweighter, **options)
    for _ in range(3):
        model.zero_grad()
        result = step.backward(train, meta)
        again = reweighter(result.losses)
        if not step.lagged:  # which learns after these weights
            torch.testing.assert_close(again.detach(), result.weights)
        other = result.losses._replace(labels=(train[1] + 1) % 4)
        assert not torch.allclose(reweighter(other), again)
        assert torch.equal(result.losses.features, sums(*train))
        losses = exit_cross_entropy(model(train[0]), train[1])
        loss = losses.mean_over_samples(result.weights * losses.losses).sum()
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_lagged_without_a_meta_batch_learns_from_what_was_seen_then() -> None:
    model = make_model("mlp")
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = [make_batch("mlp", seed=seed) for seed in (1, 2)]
    reweighter = make("sigmoid")
    step = step_of(model, reweighter, optimizer, lagged=True, objective=MeanObjective())
    before = copy.deepcopy((model, optimizer, reweighter))
    step(batches[0])
    step.backward(batches[1])
    seeing = Seeing(before[2], batches[0])
    objective = partial(
        meta_objective, *before[:2], seeing, batches[0], batches[1], conventional_loss
    )
    directions, slopes = numerical_slopes(objective, list(before[2].parameters()))
    pairs = zip(before[2].parameters(), reweighter.parameters(), strict=True)
    taken = torch.cat([(old - new).detach().flatten() for old, new in pairs])
    assert taken.norm() > 1e-8
    assert (directions @ taken - slopes).norm() < 1e-5 * taken.norm()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(5, 4), nn.ModuleList([nn.Linear(4, 4)] * 2)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        return [head(self.embed(tokens)) for head in self.heads]


@pytest.mark.parametrize("shape", ["sequence", "token", "row"])
@pytest.mark.parametrize("train_fraction", [1.0, 0.5])
def test_tokens_have_labels_and_features_of_their_own(shape: str, train_fraction: float) -> None:
    torch.manual_seed(0)
    model, (inputs, target) = Tokens().double(), torch.randint(4, (2, 4, 3)).unbind()
    target[1, 2] = -100
    of_token = torch.randn(4, 3, 2).double()
    of_token = of_token[:, :1].expand(4, 3, 2) if shape == "sequence" else of_token
    given = {"sequence": of_token[:, 0], "token": of_token, "row": of_token.reshape(12, 2)}[shape]
    reweighter = make("sigmoid", 2)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        reweighter,
        features=lambda inputs, target: given,
        train_fraction=train_fraction,
    )
    result = step.backward((inputs, target), (inputs, target))
    assert torch.equal(result.losses.labels, target.flatten())
    assert torch.equal(result.losses.features, of_token.reshape(12, 2))
    assert torch.equal(reweighter(result.losses).detach(), result.weights)


def test_a_checkpoint_goes_on_bitwise() -> None:
    train, meta = make_batch("mlp"), make_batch("mlp", 9, 2)
    steps = [step_of(make_model("mlp"), make()) for _ in range(2)]
    steps[0](train, meta)
    steps[1](meta, train)
    steps[1].load_state_dict(copy.deepcopy(steps[0].state_dict()))
    assert_same(*(list(step.reweighter.parameters()) for step in steps))
    model = make_model("mlp")
    plain = SampleReweighter(3, num_hidden=3).double()
    other = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), plain)
    with pytest.raises(ValueError, match="num_classes=4, num_features=2"):
        other.load_state_dict(steps[0].state_dict())


def test_the_published_form_does_not_see_them() -> None:
    train, meta = make_batch("mlp"), make_batch("mlp", 9, 2)
    found = []
    for target in (train[1], (train[1] + 1) % 4):
        model = make_model("mlp")
        torch.manual_seed(4)
        reweighter = SampleReweighter(3).double()
        step = MetaReweightStep(
            model,
            SGD(model.parameters(), lr=0.1),
            reweighter,
            loss=lambda z, y, labels=target: exit_cross_entropy(z, y)._replace(labels=labels),
        )
        found.append([step.backward(train, meta).weights, *reweighter.parameters()])
    assert_same(*found)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (lambda x, y: [1.0], TypeError, r"`features` must return a tensor \[B, F\], got a list"),
        (lambda x, y: y.double(), ValueError, r"\[7, F\], .* got \[7\]. Of one number"),
        (lambda x, y: x[:3], ValueError, r"\[7, F\], .* got \[3, 6\]"),
        (lambda x, y: x / 0, ValueError, "`features` must return finite values"),
    ],
)
def test_features_that_are_none_change_nothing(features, error, message) -> None:
    model, train = make_model("mlp"), make_batch("mlp")
    step = MetaReweightStep(
        model, SGD(model.parameters(), lr=0.1), SampleReweighter(3).double(), features=features
    )
    state = torch.get_rng_state()
    for call in (step.backward, step.update_reweighter):
        with pytest.raises(error, match=message):
            call(train, train)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"`features` must be a function, \(inputs, target\)"):
        MetaReweightStep(
            model, SGD(model.parameters(), lr=0.1), SampleReweighter(3), features=torch.ones(7, 2)
        )


def test_a_loss_that_has_no_labels_is_named() -> None:
    model, train = make_model("mlp"), make_batch("mlp")
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        SampleReweighter(3, num_classes=4).double(),
        loss=lambda z, y: exit_cross_entropy(z, y).losses,
        objective=MeanObjective(),
    )
    with pytest.raises(ValueError, match=r"or let `loss` return ExitLosses\(losses, labels=target"):
        step.backward(train, train)
