"""Weights and labels of the user's own, and a loss beside: in every mean and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from cases import Fixed, make_batch, make_model
from reweight import (
    BudgetedObjective,
    DirectWeights,
    ExitLosses,
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
)
from reweight.objectives import allot, exit_shares

KINDS = ["none", "sample", "exit", "missing", "both"]


def own(kind: str, size: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a loss function adds to its losses."""
    generator = torch.Generator().manual_seed(size)
    shape = (size,) if kind == "sample" else (size, 3)
    weight = 3 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight.view(-1)[0] = 0
    valid = torch.rand(size, 3, generator=generator) < 0.7
    valid[1] = False
    given = {"sample": ["weight"], "exit": ["weight"], "missing": ["valid"]}
    names = given.get(kind, ["weight", "valid"] if kind == "both" else [])
    return {name: {"weight": weight, "valid": valid}[name] for name in names}


def shares_slowly(given: dict[str, Tensor], size: int) -> Tensor:
    """Of each sample in the mean of each exit."""
    shares = torch.zeros(size, 3, dtype=torch.float64)
    for k in range(3):
        for i in range(size):
            weight = given.get("weight", torch.ones(size, dtype=torch.float64))
            share = (weight[i] if weight.dim() == 1 else weight[i, k]).item()
            shares[i, k] = share if given.get("valid", torch.ones(size, 3))[i, k] else 0
        shares[:, k] /= shares[:, k].sum().item()
    return shares


def regulariser(logits: list[Tensor]) -> Tensor:
    return 0.1 * logits[0].square().mean()


def loss_of(kind: str, with_auxiliary: bool):
    def loss(logits: list[Tensor], target: Tensor) -> ExitLosses:
        losses = exit_cross_entropy(logits, target)
        given = own(kind, len(target), losses.losses.dtype)
        if "valid" in given:  # what stands there is not to matter
            spoilt = losses.losses.masked_fill(~given["valid"], torch.nan)
            losses = losses._replace(losses=spoilt)
        extra = {"auxiliary": regulariser(logits)} if with_auxiliary else {}
        return losses._replace(**given, **extra)

    return loss


def by_hand(model: nn.Module, weights: Tensor, kind: str, with_auxiliary: bool, train, meta, lr):
    """The gradient of L_tr, and ∂L_meta/∂w by double backward, from the definition."""
    named = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    weights = weights.detach().clone().requires_grad_()

    def losses(parameters, batch) -> tuple[Tensor, list[Tensor]]:
        logits = functional_call(model, parameters, (batch[0],))
        columns = [F.cross_entropy(z, batch[1], reduction="none") for z in logits]
        return torch.stack(columns, 1), logits

    matrix, logits = losses(named, train)
    shares = shares_slowly(own(kind, len(matrix)), len(matrix)).to(matrix)
    train_loss = (shares * weights * matrix).sum()
    if with_auxiliary:
        train_loss = train_loss + regulariser(logits)
    gradients = torch.autograd.grad(train_loss, list(named.values()), create_graph=True)
    moved = {n: p - lr * g for (n, p), g in zip(named.items(), gradients, strict=True)}
    matrix, _ = losses(moved, meta)
    shares = shares_slowly(own(kind, len(matrix)), len(matrix)).to(matrix)
    (value,) = torch.autograd.grad((shares * matrix).sum(), weights)
    return [g.detach() for g in gradients], value, train_loss.detach()


WAYS = {
    "forward": {"estimator": "forward"},
    "unrolled": {"estimator": "unrolled"},
    "lean": {"lean": True},
    "lagged": {"lagged": True},
}


@pytest.mark.parametrize("with_auxiliary", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_and_hypergradient_are_those_of_the_definition(
    options, kind: str, with_auxiliary: bool, dtype: torch.dtype
) -> None:
    model = make_model("mlp").to(dtype)
    train, meta = ((x.to(dtype), y) for x, y in (make_batch("mlp"), make_batch("mlp", 9, 2)))
    weights = 1 + torch.rand(7, 3, dtype=dtype)
    expected = by_hand(model, weights, kind, with_auxiliary, train, meta, 0.1)
    fixed = Fixed(weights)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        fixed,
        reweighter_optimizer=SGD(fixed.parameters(), lr=1e-30),  # which moves nothing
        objective=MeanObjective(),
        loss=loss_of(kind, with_auxiliary),
        **options,
    )
    result = step.backward(train, meta)
    tolerance = {"rtol": 1e-9, "atol": 1e-13} if dtype == torch.float64 else {}
    for parameter, gradient in zip(model.parameters(), expected[0], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tolerance)
    torch.testing.assert_close(result.hypergradient, expected[1], **tolerance)
    torch.testing.assert_close(result.train_loss, expected[2], **tolerance)
    assert result.backward_difference < 100 * torch.finfo(dtype).eps
    assert not result.nonfinite.any()


@pytest.mark.parametrize("estimator", ["forward", "unrolled"])
def test_direct_weights_judge_by_the_step_of_the_auxiliary_loss_alone(estimator: str) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    zeros = torch.zeros(7, 3, dtype=torch.float64)
    _, value, _ = by_hand(model, zeros, "both", True, train, meta, 0.1)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        DirectWeights(3),
        loss=loss_of("both", True),
        estimator=estimator,
    )
    result = step.update_reweighter(train, meta)
    torch.testing.assert_close(result.hypergradient, value, rtol=1e-9, atol=1e-13)
    shares = shares_slowly(own("both", 7), 7)
    helpful = torch.where(shares > 0, -value / shares, 0).clamp(min=0)
    mean, rms = (shares * helpful).sum(0), (shares * helpful.square()).sum(0).sqrt()
    expected = torch.where(shares > 0, helpful / torch.maximum(mean, rms / 2), 1)
    torch.testing.assert_close(result.weights, expected)
    assert result.backward_difference < 1e-12


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_parts_have_their_share_of_the_auxiliary_loss(scaled: bool) -> None:
    factor = 2.0**8 if scaled else 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=factor) if scaled else None
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", 9, 2)
    fixed = Fixed(1 + torch.rand(7, 3, dtype=torch.float64)).requires_grad_(False)
    expected, _, _ = by_hand(model, fixed.weights, "none", True, train, meta, 0.1)
    learning = Fixed(fixed.weights)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        learning,
        reweighter_optimizer=SGD(learning.parameters(), lr=1e-30),
        loss=loss_of("none", True),
        scaler=scaler,
    )
    for _ in range(2):
        assert step.backward(train, meta, scale=0.5).backward_difference < 1e-12
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, factor * gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
@pytest.mark.parametrize("average_over", ["exits", "samples", "both"])
def test_learned_weights_average_one_where_they_count(kind, form, average_over) -> None:
    given = own(kind, 9)
    losses = ExitLosses(torch.rand(9, 3).double(), **given)
    reweighter = SampleReweighter(3, form=form, average_over=average_over).double()
    weights = reweighter(losses)
    valid = given.get("valid", torch.ones(9, 3, dtype=torch.bool))
    if average_over == "exits":
        rows = valid.any(1)
        found = (torch.where(valid, weights, 0).sum(1) / valid.sum(1).clamp(min=1))[rows]
    else:
        found = (shares_slowly(given, 9) * weights).sum(0)
        found = found.mean() if average_over == "both" else found
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-13)
    spoilt = losses._replace(losses=losses.losses.masked_fill(~valid, torch.nan))
    assert torch.equal(reweighter(spoilt)[valid], weights[valid])


def test_own_weights_give_the_mean_of_pytorchs_class_weights() -> None:
    logits, target = torch.randn(6, 3), torch.tensor([0, 2, 1, 0, -100, 2])
    class_weight = torch.tensor([0.1, 1.0, 10.0])
    losses = exit_cross_entropy(logits, target)
    losses = losses._replace(weight=class_weight[target.clamp(min=0)])
    expected = F.cross_entropy(logits, target, weight=class_weight)
    torch.testing.assert_close(losses.mean_over_samples(losses.losses)[0], expected)
    over_samples = exit_cross_entropy(logits, target, class_weight=class_weight)
    expected = F.cross_entropy(logits, target, weight=class_weight, reduction="sum") / 5
    torch.testing.assert_close(over_samples.mean_over_samples(over_samples.losses)[0], expected)


def test_the_budgeted_objective_judges_where_there_is_a_label_by_own_weights() -> None:
    given = own("both", 9)
    losses, confidence = torch.rand(9, 3).double(), torch.rand(9, 3).double()
    meta = ExitLosses(losses, confidence, **given)
    found = BudgetedObjective()(meta)
    rows = given["valid"].any(1)
    assert found.shares.sum() == pytest.approx(1)
    allotted = allot(confidence, exit_shares(3, 0.75), rows) & given["valid"]
    weight = torch.where(allotted, given["weight"], 0)
    expected = ((weight * losses).sum(0) / weight.sum(0).clamp(min=1e-30)).sum()
    assert found.value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.ones(3)}, r"`weight` \[7\] or \[7, 3\], got \[3\]"),
        ({"valid": torch.ones(7, 1) > 0}, r"`valid` \[7\] or \[7, 3\], got \[7, 1\]"),
        ({"weight": -torch.ones(7)}, "`weight` of at least 0"),
        ({"auxiliary": torch.ones(7)}, r"`auxiliary` a scalar, got \[7\]"),
    ],
)
def test_what_does_not_fit_the_losses_is_named(given, message) -> None:
    model, train = make_model("mlp"), make_batch("mlp")
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        SampleReweighter(3).double(),
        loss=lambda z, y: exit_cross_entropy(z, y)._replace(**given),
    )
    with pytest.raises(ValueError, match=message):
        step.backward(train, train)
    assert all(p.grad is None for p in model.parameters())
