"""What a step reports, from numbers written by hand."""

import pytest
import torch

from reweight import ExitLosses, MetaLoss, StepResult
from reweight.result import Update

LOSSES = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
WEIGHTS = torch.tensor([[0.5, 1.5], [1.0, 1.0], [1.5, 0.5]])


def update(*nonfinite: bool) -> Update:
    meta_loss = MetaLoss(torch.tensor(0.25), torch.tensor([0.75, 0.25]))
    flags = torch.tensor(nonfinite or [False] * 4)
    value = torch.ones(3, 2)
    return Update(meta_loss, torch.tensor(0.125), flags, 3, torch.tensor(0.0), value, lambda: None)


def test_the_train_loss_is_the_weighted_mean_of_each_exit_added_up() -> None:
    result = StepResult.of(ExitLosses(LOSSES), WEIGHTS, None)
    expected = (0.5 * 1 + 1 * 3 + 1.5 * 5) / 3 + (1.5 * 2 + 1 * 4 + 0.5 * 6) / 3
    assert result.train_loss.item() == pytest.approx(expected)
    assert not result.losses.losses.requires_grad
    assert result.meta_loss is result.hypergradient_norm is result.nonfinite is None


def test_a_sample_that_does_not_count_is_in_no_mean() -> None:
    losses = ExitLosses(LOSSES, valid=torch.tensor([True, False, True]))
    result = StepResult.of(losses, WEIGHTS, None)
    assert result.train_loss.item() == pytest.approx((0.5 + 7.5) / 2 + (3 + 3) / 2)
    assert result.scalars()["weight/exit_1"].item() == pytest.approx(1.0)
    assert result.scalars()["loss/exit_2"].item() == pytest.approx(4.0)


def test_scalars_are_those_of_every_exit_and_of_the_update() -> None:
    result = StepResult.of(ExitLosses(LOSSES), WEIGHTS, update())
    found = {name: value.item() for name, value in result.scalars().items()}
    assert found == {
        "train_loss": pytest.approx(7.0),
        "loss/exit_1": 3.0,
        "loss/exit_2": 4.0,
        "weight/exit_1": 1.0,
        "weight/exit_2": 1.0,
        "weight_std/exit_1": pytest.approx((2 * 0.25 / 3) ** 0.5),
        "weight_std/exit_2": pytest.approx((2 * 0.25 / 3) ** 0.5),
        "share/exit_1": 0.75,
        "share/exit_2": 0.25,
        "meta_loss": 0.25,
        "hypergradient_norm": 0.125,
    }
    without = StepResult.of(ExitLosses(LOSSES), WEIGHTS, None).scalars()
    assert set(found) - set(without) == {
        "share/exit_1",
        "share/exit_2",
        "meta_loss",
        "hypergradient_norm",
    }


def test_it_prints_its_summary() -> None:
    result = StepResult.of(ExitLosses(torch.rand(4, 2)), torch.ones(4, 2), None)
    assert str(result) == result.summary()


def test_the_summary_is_one_line_that_says_what_went_wrong() -> None:
    plain = StepResult.of(ExitLosses(LOSSES), WEIGHTS, None).summary()
    assert plain == "train loss 7.0000, weights 0.50…1.50"
    good = StepResult.of(ExitLosses(LOSSES), WEIGHTS, update()).summary()
    assert good == "train loss 7.0000, meta loss 0.2500, weights 0.50…1.50"
    bad = StepResult.of(ExitLosses(LOSSES), WEIGHTS, update(False, True, True, False)).summary()
    assert bad.endswith("reweighter not updated: non-finite meta loss, hypergradient")
