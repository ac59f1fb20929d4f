"""The meta losses against sums written out sample by sample."""

import pytest
import torch

from references import budgeted_loss_slowly
from reweight import BudgetedObjective, ExitLosses, MeanObjective, exit_cross_entropy


@pytest.mark.parametrize("power", [0.3, 0.75, 1.0, 1.5])
@pytest.mark.parametrize("num_exits", [1, 2, 5])
@pytest.mark.parametrize("num_samples", [1, 3, 20])
def test_budgeted_objective_equals_its_slow_twin(num_samples, num_exits, power) -> None:
    logits = [torch.randn(num_samples, 4, dtype=torch.float64) for _ in range(num_exits)]
    target = torch.randint(4, (num_samples,))
    loss = BudgetedObjective(power)(exit_cross_entropy(logits, target))
    expected = budgeted_loss_slowly(logits, target, power)
    torch.testing.assert_close(loss.value, expected, rtol=1e-13, atol=1e-13)
    assert loss.shares.sum().item() == pytest.approx(1)


def test_mean_objective_is_the_conventional_loss_of_the_valid_samples() -> None:
    losses = torch.rand(6, 3)
    valid = torch.tensor([True, False, True, True, False, True])
    loss = MeanObjective()(ExitLosses(losses, valid=valid))
    torch.testing.assert_close(loss.value, losses[valid].mean(0).sum())
    assert loss.shares.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("objective", [MeanObjective(), BudgetedObjective()])
def test_no_valid_sample_gives_zero_with_a_graph(objective) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = objective(exit_cross_entropy([logits, logits], torch.full((4,), -100)))
    assert loss.value.item() == 0
    (gradient,) = torch.autograd.grad(loss.value, logits)
    assert torch.equal(gradient, torch.zeros(4, 3))


@pytest.mark.parametrize("objective", [MeanObjective(), BudgetedObjective()])
def test_a_loss_that_does_not_count_may_be_anything(objective) -> None:
    losses, valid = torch.rand(4, 2), torch.tensor([True, True, False, True])
    expected = objective(ExitLosses(losses, losses, valid=valid)).value
    losses = losses.clone()
    losses[2] = torch.inf
    assert torch.equal(objective(ExitLosses(losses, losses, valid=valid)).value, expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="`power` must be positive"):
        BudgetedObjective(power=-1)
    with pytest.raises(ValueError, match="use MeanObjective"):
        BudgetedObjective()(ExitLosses(torch.rand(2, 2)))
