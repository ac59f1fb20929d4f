"""The hypergradient against double backward and against differences of the whole meta objective."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from cases import EXITS, MODELS, OPTIMIZERS, make_batch, make_model, warm_up
from references import budgeted_loss_slowly, meta_objective, numerical_gradient
from reweight import BudgetedObjective, MetaReweightStep, SampleReweighter

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
    model = make_model(model_name, num_exits)
    optimizer = OPTIMIZERS[optimizer_name](model)
    train, meta = make_batch(model_name, seed=1), make_batch(model_name, num_samples=9, seed=2)
    warm_up(model, optimizer, train)
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
    numerical = numerical_gradient(objective, list(reweighter.parameters()))

    scale = gradients["unrolled"].norm()
    assert scale > 1e-8, "a gradient of zero would agree with anything"
    assert (gradients["forward"] - gradients["unrolled"]).norm() < 1e-10 * scale
    # Central differences at 1e-4: the third derivative leaves up to 1e-6 of relative error here.
    assert (gradients["forward"] - numerical).norm() < 1e-5 * scale
