"""The hypergradient against double backward and against differences of the whole meta objective."""

import copy
from functools import partial

import pytest
import torch
import torchopt
from torch import Tensor
from torch.optim import SGD

from cases import (
    EXITS,
    MODELS,
    OPTIMIZERS,
    TORCHOPT,
    UPDATE_RULES,
    Fixed,
    conventional_loss,
    make_batch,
    make_model,
    warm_up,
    warmed,
)
from references import (
    budgeted_loss_slowly,
    meta_objective,
    numerical_slopes,
    stock_hypergradient,
)
from reweight import BudgetedObjective, MeanObjective, MetaReweightStep, SampleReweighter

POWER = 0.75


def learned_gradient(step_at: MetaReweightStep, train, meta) -> Tensor:
    """The gradient that reaches the reweighter: what SGD with rate 1 subtracts from it."""
    parameters = list(step_at.reweighter.parameters())
    before = [p.detach().clone() for p in parameters]
    step_at.update_reweighter(train, meta)
    gradient = torch.cat(
        [(b - p.detach()).flatten() for b, p in zip(before, parameters, strict=True)]
    )
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return gradient


@pytest.mark.parametrize("num_exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_estimators_agree_with_each_other_and_with_differences(
    model_name: str, optimizer_name: str, num_exits: int
) -> None:
    model, optimizer = warmed(model_name, OPTIMIZERS[optimizer_name], num_exits)
    train, meta = make_batch(model_name, seed=1), make_batch(model_name, num_samples=9, seed=2)
    reweighter = SampleReweighter(num_exits, num_hidden=3).double()

    gradients = {}
    for estimator in ("forward", "unrolled"):
        step = MetaReweightStep(
            model,
            optimizer,
            reweighter,
            reweighter_optimizer=SGD(reweighter.parameters(), lr=1.0),
            objective=BudgetedObjective(POWER),
            estimator=estimator,
        )
        gradients[estimator] = learned_gradient(step, train, meta)
    objective = partial(
        meta_objective,
        model,
        optimizer,
        reweighter,
        train,
        meta,
        partial(budgeted_loss_slowly, power=POWER),
    )
    directions, slopes = numerical_slopes(objective, list(reweighter.parameters()))

    scale = gradients["unrolled"].norm()
    assert scale > 1e-8, "a gradient of zero would agree with anything"
    assert (gradients["forward"] - gradients["unrolled"]).norm() < 1e-10 * scale
    # Central differences at 1e-4: the third derivative leaves up to 1e-6 of relative error here.
    assert (directions @ gradients["forward"] - slopes).norm() < 1e-5 * scale


def recorded(model, optimizer, train, meta, **options) -> tuple[Tensor, Tensor]:
    """The weights and their hypergradient."""
    weights = 1 + torch.rand(len(train[1]), 3, dtype=torch.float64)
    recording = Fixed(weights)
    MetaReweightStep(
        model,
        optimizer,
        recording,
        reweighter_optimizer=SGD(recording.parameters(), lr=1.0),
        objective=MeanObjective(),
        **options,
    ).update_reweighter(train, meta)
    return weights, weights - recording.weights.detach()


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_equals_double_backward_through_the_stock_optimizer(rule: str) -> None:
    model, optimizer = warmed("mlp", UPDATE_RULES[rule], num_steps=8)
    train, meta = make_batch("mlp"), make_batch("mlp", seed=2)
    weights, hypergradient = recorded(model, optimizer, train, meta)
    expected = stock_hypergradient(model, optimizer, weights, train, meta, conventional_loss)
    assert expected.norm() > 1e-8
    assert (hypergradient - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize(
    "rule",
    ["sgd_momentum", "sgd_dampening", "sgd_nesterov_two_groups"],
)
def test_the_first_step_of_momentum_has_its_gradient(rule: str) -> None:
    """Where the stock class, run differentiably, loses it: against differences of the real step."""
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    optimizer = UPDATE_RULES[rule](model)
    weights, hypergradient = recorded(model, optimizer, train, meta)
    direction = torch.randn_like(weights)

    def objective(sign: int) -> float:
        moved = Fixed(weights + sign * 1e-5 * direction)
        return meta_objective(model, optimizer, moved, train, meta, conventional_loss)

    slope = (objective(1) - objective(-1)) / 2e-5
    assert (hypergradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("rule", TORCHOPT)
def test_through_an_optimizer_of_torchopt(rule: str) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    optimizer = TORCHOPT[rule](tuple(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        conventional_loss(model(train[0]), train[1]).backward()
        optimizer.step()
    exact, unrolled = (
        recorded_with_seed(model, optimizer, train, meta, estimator=estimator)
        for estimator in ("forward", "unrolled")
    )
    assert exact.norm() > 1e-8
    assert (exact - unrolled).norm() < 1e-10 * exact.norm()


def recorded_with_seed(*args, **options) -> Tensor:
    torch.manual_seed(3)
    return recorded(*args, **options)[1]


def test_a_bare_transformation_of_torchopt_gets_an_optimizer() -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    step = MetaReweightStep(model, torchopt.adam(lr=0.01), SampleReweighter(3).double())
    before = [p.detach().clone() for p in model.parameters()]
    first = step(train, meta)
    for _ in range(20):
        last = step(train, meta)
    assert last.train_loss < first.train_loss
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("model_name", ["mlp", "conv_batch_norm", "recurrent"])
def test_finite_differences_come_close(model_name: str) -> None:
    model, train, meta = (
        make_model(model_name),
        make_batch(model_name),
        make_batch(model_name, 9, 2),
    )
    optimizer = OPTIMIZERS["adam"](model)
    warm_up(model, optimizer, train)
    exact, near = (
        recorded_with_seed(model, optimizer, train, meta, estimator=estimator)
        for estimator in ("forward", "finite_difference")
    )
    # Steps of 4e-11·‖θ‖ in float64: rounding of the losses leaves about 1e-16 / 4e-11.
    assert (near - exact).norm() < 1e-4 * exact.norm()


def test_gradient_descent_stands_in_for_an_unknown_optimizer() -> None:
    class Mine(SGD):
        pass

    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    known = recorded_with_seed(model, SGD(model.parameters(), lr=0.1), train, meta)
    unknown = recorded_with_seed(
        model,
        Mine(model.parameters(), lr=0.1, momentum=0.9),
        train,
        meta,
        pseudo_update="gradient_descent",
    )
    torch.testing.assert_close(known, unknown, rtol=1e-12, atol=0)


class Counting(torch.nn.Module):
    """Takes the number of batches for a number, of which PyTorch tells nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x))
        return torch.add(y, y.square(), alpha=self.norm.num_batches_tracked)


def test_counters_in_the_passes_are_those_of_the_forward() -> None:
    torch.manual_seed(0)
    model, reweighter = Counting().double(), SampleReweighter(1, form="sigmoid").double()
    train, meta = ((torch.randn(6, 5).double(), torch.randint(4, (6,))) for _ in range(2))
    found = []
    for estimator in ("forward", "unrolled"):
        twin, g = copy.deepcopy((model, reweighter))
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        step = MetaReweightStep(twin, optimizer, g, estimator=estimator)
        step(train, meta)
        found.append(step.backward(train, meta).hypergradient)
        assert twin.norm.num_batches_tracked == 2
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
