"""What the prediction of a hypergradient learns from one."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from properties import assert_same
from reweight import ExitLosses, MeanObjective, MetaReweightStep, SampleReweighter
from reweight._meta.learners import PredictedLearner, learner_of
from reweight._meta.problem import Hypergradient
from reweight.losses import exit_cross_entropy
from reweight.objectives import MetaLoss


def set_up(dtype: torch.dtype = torch.float64) -> tuple[PredictedLearner, ExitLosses, Tensor]:
    torch.manual_seed(0)
    reweighter = SampleReweighter(2, form="predicted", num_classes=3, num_hidden=8).to(dtype)
    learner = learner_of(reweighter, SGD(reweighter.parameters(), 0.1), 1, None, lagged=False)
    seen = {"labels": torch.tensor([0, 1, 2, 0, 1, 2]), "features": torch.rand(6, 3, dtype=dtype)}
    losses = ExitLosses(torch.rand(6, 2, dtype=dtype), **seen)
    return learner, losses, torch.randn(6, 2, dtype=dtype)


def learn(learner: PredictedLearner, losses: ExitLosses, value: Tensor):
    meta = MetaLoss(torch.tensor(1.5, dtype=value.dtype), torch.ones(2))
    return learner.learn(losses, learner.ahead(losses), Hypergradient(value, meta, 0))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_ten_steps_of_regression_on_the_last_ten_batches(dtype, close, scale) -> None:
    """By hand, row by row, less the mean; rows that are invalid or of derivative 0 play no part.

    In float32 sums of a dozen terms, each step from the last: far below 1e-4.
    """
    learner, losses, _ = set_up(dtype)
    valid = torch.tensor([True, True, False, True, True, True])
    twin, rows = copy.deepcopy(learner.reweighter), [0, 1, 3, 5]
    optimizer, batches = SGD(twin.parameters(), 0.1), []
    for number in range(12):
        losses = losses._replace(losses=torch.rand(6, 2, dtype=dtype), valid=valid)
        value = torch.randn(6, 2, dtype=dtype)
        value[4] = 0
        batches.append((losses, value))
        for _ in range(10):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=dtype)
            for seen, target in batches[-10:]:
                raw = twin.network(twin.seen(seen))
                for k in range(2):
                    mean = sum(target[i, k] for i in rows) / 4
                    size = sum((target[i, k] - mean).abs() for i in rows) / 4
                    errors = [raw[i, k] + (target[i, k] - mean) / size for i in rows]
                    total = total + sum(error**2 for error in errors) / 5
            (total / 2 / min(number + 1, 10)).backward()
            optimizer.step()
        update = learn(learner, losses, scale * value)
        assert not update.nonfinite.any()
    for ours, theirs in zip(learner.reweighter.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    assert twin.network[-1].weight.norm() > 0.01


def test_what_is_not_finite_or_undone_changes_nothing() -> None:
    learner, losses, value = set_up()
    learn(learner, losses, value)
    before = copy.deepcopy(learner.state_dict())
    update = learn(learner, losses, torch.full_like(value, torch.inf))
    assert update.nonfinite[2]
    assert int(learner.num_skipped) == 1
    assert_same(learner.reweighter.state_dict(), before["reweighter"])
    assert learner.lessons[-1][2].sum() == 0  # nothing to be learned from it later either
    update.undo()
    learn(learner, losses, 2 * value).undo()
    assert_same(learner.state_dict(), before)


def test_goes_on_as_if_it_had_not_stopped() -> None:
    learner, losses, value = set_up()
    learn(learner, losses, value)
    state = copy.deepcopy(learner.state_dict())
    other = set_up()[0]
    other.load_state_dict(state)
    for each in (learner, other):
        learn(each, losses, value.flip(0))
    assert_same(other.state_dict(), learner.state_dict())


def test_its_defaults() -> None:
    reweighter = SampleReweighter(3, form="predicted")
    learner = learner_of(reweighter, None, 10, None, lagged=False)
    assert learner.default_objective is MeanObjective
    assert type(learner.optimizer) is AdamW
    assert learner.optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("num_exits", [1, 2])
def test_tells_labels_of_the_next_class_apart(num_exits: int) -> None:
    """At every fifth batch, 18 in all; labels move to the next class."""
    torch.manual_seed(0)
    centers = 2 * torch.eye(4)
    classes = torch.randint(4, (640,))
    inputs = centers[classes] + 0.5 * torch.randn(640, 4)
    wrong = torch.rand(640) < 0.4
    labels = torch.where(wrong, (classes + 1) % 4, classes)
    model = Heads(num_exits)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    reweighter = SampleReweighter(num_exits, form="predicted", num_classes=4)
    step = MetaReweightStep(model, optimizer, reweighter, interval=5)
    weights = torch.ones(640, num_exits)
    for _ in range(6):
        for rows in torch.randperm(600).split(40):
            clean = slice(600, 640)
            result = step((inputs[rows], labels[rows]), (inputs[clean], classes[clean]))
            weights[rows] = result.weights
    assert weights[:600][wrong[:600]].mean() < 0.4
    assert weights[:600][~wrong[:600]].mean() > 1.3
    accuracy = (model(inputs)[-1].argmax(1) == classes).double().mean()
    assert accuracy > 0.93


class Heads(nn.Module):
    """Linear exits."""

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        self.exits = nn.ModuleList(nn.Linear(4, 4) for _ in range(num_exits))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [each(x) for each in self.exits]


def test_options_of_the_cross_entropy_leave_what_the_prediction_sees() -> None:
    batches = [(torch.randn(8, 4), torch.randint(4, (8,))) for _ in range(2)]
    results = []
    for loss in (exit_cross_entropy, partial(exit_cross_entropy, label_smoothing=0.0)):
        torch.manual_seed(0)
        model = Heads(2)
        reweighter = SampleReweighter(2, form="predicted", num_classes=4)
        step = MetaReweightStep(model, SGD(model.parameters(), 0.1), reweighter, loss=loss)
        results.append(step(*batches))
    assert torch.equal(results[0].weights, results[1].weights)

    def bare(outputs: list[Tensor], target: Tensor) -> ExitLosses:
        return exit_cross_entropy(outputs, target)

    step = MetaReweightStep(model, SGD(model.parameters(), 0.1), reweighter, loss=bare)
    with pytest.raises(ValueError, match="Let `loss` call exit_cross_entropy with probabilities="):
        step(*batches)
