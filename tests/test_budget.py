"""Allotment, thresholds and the curve against slow twins, and on what Hypothesis thinks of."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from references import allot_slowly, thresholds_slowly
from reweight import (
    ExitLosses,
    anytime_accuracy,
    budgeted_curve,
    choose_exits,
    exit_cross_entropy,
    exit_shares,
    find_thresholds,
)
from reweight.objectives import allot, quotas

SIZES = [1, 2, 3, 5, 10, 49, 200]
NUM_EXITS = [1, 2, 3, 5, 12]


def random_confidence(num_samples: int, num_exits: int, num_values: int, seed: int):
    """Confidences with ties: drawn from few values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, num_values + 1, (num_samples, num_exits), generator=generator)
    return drawn.double() / num_values


@pytest.mark.parametrize("power", [0.05, 0.75, 1.0, 1.9])
@pytest.mark.parametrize("num_exits", NUM_EXITS)
def test_shares_are_powers_that_add_up(num_exits: int, power: float) -> None:
    shares = exit_shares(num_exits, power)
    assert shares.sum().item() == pytest.approx(1, abs=1e-15)
    for k in range(1, num_exits):
        assert (shares[k] / shares[k - 1]).item() == pytest.approx(power, rel=1e-12)


def test_published_shares() -> None:
    expected = [0.328, 0.246, 0.184, 0.138, 0.104]
    assert exit_shares(5, 0.75).tolist() == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("num_values", [2, 7, 10**6])
@pytest.mark.parametrize("num_exits", NUM_EXITS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_allotment_equals_its_slow_twin(num_samples: int, num_exits: int, num_values: int) -> None:
    rng = random.Random(f"{num_samples} {num_exits} {num_values}")
    for power in (0.3, 1.0, 1.5):
        confidence = random_confidence(num_samples, num_exits, num_values, rng.randrange(10**6))
        valid = [rng.random() < 0.8 for _ in range(num_samples)]
        shares = exit_shares(num_exits, power)
        members = allot(confidence, shares, torch.tensor(valid))
        expected = allot_slowly(confidence, shares.tolist(), valid)
        found = [row.index(True) if any(row) else None for row in members.tolist()]
        assert found == expected
        assert members.sum() == sum(valid)


@pytest.mark.parametrize("num_exits", [1, 2, 3, 7])
def test_equal_shares_divide_evenly(num_exits: int) -> None:
    members = allot(torch.rand(7 * num_exits, num_exits), exit_shares(num_exits, 1.0))
    assert members.sum(0).tolist() == [7] * num_exits


def test_allotment_starves_no_exit_when_all_confidences_are_saturated() -> None:
    members = allot(torch.ones(100, 5), exit_shares(5, 0.75))
    assert members.sum(0).tolist() == [32, 24, 18, 13, 13]


@pytest.mark.parametrize("num_values", [2, 7, 10**6])
@pytest.mark.parametrize("num_exits", NUM_EXITS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_thresholds_equal_their_slow_twin(num_samples, num_exits, num_values) -> None:
    for seed, power in enumerate((0.3, 1.0, 1.5)):
        confidence = random_confidence(num_samples, num_exits, num_values, seed)
        shares = exit_shares(num_exits, power)
        assert find_thresholds(confidence, shares).tolist() == thresholds_slowly(
            confidence, shares.tolist()
        )


@pytest.mark.parametrize("num_exits", NUM_EXITS)
def test_thresholds_without_ties_give_every_exit_its_floor(num_exits: int) -> None:
    confidence, shares = (
        torch.rand(200, num_exits, dtype=torch.float64),
        exit_shares(num_exits, 0.8),
    )
    exits = choose_exits(confidence, find_thresholds(confidence, shares))
    counts = exits.bincount(minlength=num_exits).tolist()
    assert counts[:-1] == [math.floor(200 * share) for share in shares[:-1].tolist()]


@pytest.mark.parametrize("saturated", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("power", [0.25, 0.75, 1.0, 1.5])
def test_thresholds_starve_no_exit_when_confidences_saturate(power, saturated) -> None:
    """Most samples at exactly 1.0 everywhere, which left late exits unreachable when published."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(5000, 5, generator=generator)
    confidence[torch.rand(5000, 5, generator=generator) < saturated] = 1.0
    exits = choose_exits(confidence, find_thresholds(confidence, exit_shares(5, power)))
    assert (exits.bincount(minlength=5) > 0).all()


def test_float64_logits_keep_confident_samples_apart() -> None:
    logits = torch.tensor([[20.0, 0.0], [21.0, 0.0], [22.0, 0.0], [23.0, 0.0]])
    target = torch.zeros(4, dtype=torch.int64)
    coarse = exit_cross_entropy([logits, logits], target).confidence
    fine = exit_cross_entropy([logits.double(), logits.double()], target).confidence
    assert len(coarse[:, 0].unique()) == 1
    exits = choose_exits(fine, find_thresholds(fine, exit_shares(2, 1.0)))
    assert exits.tolist() == [1, 1, 0, 0]


def test_budgeted_curve_by_hand() -> None:
    confidence = torch.tensor([[0.9, 0.9], [0.8, 0.8], [0.2, 0.7], [0.1, 0.6]])
    correct = torch.tensor([[True, True], [False, True], [False, True], [False, False]])
    split = ExitLosses(torch.zeros(4, 2), confidence, correct)
    (point,) = budgeted_curve(split, split, costs=[10, 30], powers=[1.0])
    assert point.thresholds.tolist() == pytest.approx([0.8, -math.inf])
    assert point.accuracy == 0.5
    assert point.cost == 20.0
    assert point.shares.tolist() == [0.5, 0.5]
    assert anytime_accuracy(split).tolist() == [0.25, 0.75]


def test_budgeted_curve_runs_from_cheap_to_dear() -> None:
    confidence, correct = torch.rand(300, 4), torch.rand(300, 4) < 0.5
    split = ExitLosses(torch.zeros(300, 4), confidence, correct)
    costs = [point.cost for point in budgeted_curve(split, split, [1, 2, 3, 4])]
    assert len(costs) == 39
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exit_shares(0, 1.0), "num_exits"),
        (lambda: exit_shares(3, 0.0), "power"),
        (lambda: find_thresholds(torch.zeros(0, 3), exit_shares(3, 1.0)), "hold a sample"),
        (lambda: find_thresholds(torch.rand(4, 3), exit_shares(2, 1.0)), r"\[3\], got \[2\]"),
        (
            lambda: budgeted_curve(*[ExitLosses(torch.zeros(2, 2), torch.zeros(2, 2))] * 2, [1, 2]),
            "must carry correct",
        ),
        (
            lambda: budgeted_curve(
                *[ExitLosses(*[torch.zeros(2, 2)] * 3)] * 2, costs=[1.0, 2.0, 3.0]
            ),
            "same number of exits, got 3, 2 and 2",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_ignored_samples_play_no_part() -> None:
    logits = [torch.randn(40, 5, dtype=torch.float64) for _ in range(3)]
    target = torch.randint(5, (40,))
    some = exit_cross_entropy(logits, target)
    more = exit_cross_entropy(
        [torch.cat([z, torch.randn(20, 5).double()]) for z in logits],
        torch.cat([target, torch.full((20,), -100)]),
    )
    assert torch.equal(anytime_accuracy(some), anytime_accuracy(more))
    for ours, theirs in zip(
        budgeted_curve(some, some, [1, 2, 3]), budgeted_curve(more, more, [1, 2, 3]), strict=True
    ):
        assert ours.accuracy == theirs.accuracy
        assert torch.equal(ours.thresholds, theirs.thresholds)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_one_exit_takes_all_where_no_confidence_differs(power: float) -> None:
    """What no threshold can prevent."""
    confidence = torch.ones(100, 3)
    exits = choose_exits(confidence, find_thresholds(confidence, exit_shares(3, power)))
    assert len(exits.unique()) == 1


def test_shares_may_leave_exits_out() -> None:
    confidence = torch.rand(50, 3)
    thresholds = find_thresholds(confidence, torch.tensor([1.0, 0.0, 0.0]))
    assert (choose_exits(confidence, thresholds) == 0).all()


def test_confidences_that_are_no_number_leave_at_the_last_exit() -> None:
    confidence = torch.tensor([[torch.nan, 0.5], [0.9, 0.9], [0.8, 0.7], [0.7, 0.6]])
    thresholds = find_thresholds(confidence, exit_shares(2, 1.0))
    assert torch.equal(thresholds, torch.tensor([0.8, -torch.inf]))
    assert choose_exits(confidence, thresholds).tolist() == [1, 0, 0, 1]


def test_thresholds_of_another_number_of_exits_are_named() -> None:
    with pytest.raises(ValueError, match=r"`thresholds` must have shape \[2\], got \[1\]"):
        choose_exits(torch.rand(4, 2), torch.tensor([0.5]))
    with pytest.raises(TypeError, match=r"`confidence` must be a tensor .* got ExitLosses"):
        find_thresholds(ExitLosses(torch.rand(4, 2)), exit_shares(2, 1.0))


confidences = st.tuples(st.integers(1, 40), st.integers(1, 6)).flatmap(
    lambda shape: arrays("float64", shape, elements=st.floats(0, 1, width=16))
)


powers = st.floats(0.05, 4)


@settings(max_examples=80, deadline=None)
@given(confidences, powers, st.randoms(use_true_random=False))
def test_every_valid_sample_goes_to_one_exit_and_every_exit_gets_its_quota(
    confidence, power, rng
) -> None:
    confidence = torch.from_numpy(confidence)
    num_samples, num_exits = confidence.shape
    valid = torch.tensor([rng.random() < 0.7 for _ in range(num_samples)])
    shares = exit_shares(num_exits, power)
    members = allot(confidence, shares, valid)
    assert torch.equal(members.sum(1), valid.long())
    expected = quotas(shares, valid.sum())[:-1]
    assert torch.equal(members.sum(0)[:-1].double(), expected)
    for k in range(num_exits - 1):  # nobody left behind is more confident than one who was taken
        later = members[:, k + 1 :].any(1)
        if members[:, k].any() and later.any():
            assert confidence[members[:, k], k].min() >= confidence[later, k].max()


@settings(max_examples=80, deadline=None)
@given(confidences, powers)
def test_thresholds_never_pass_a_quota_but_for_a_tie(confidence, power) -> None:
    confidence = torch.from_numpy(confidence)
    num_samples, num_exits = confidence.shape
    shares = exit_shares(num_exits, power)
    thresholds = find_thresholds(confidence, shares)
    exits = choose_exits(confidence, thresholds)
    for k in range(num_exits - 1):
        above = ((exits == k) & (confidence[:, k] > thresholds[k])).sum()
        assert above <= quotas(shares[k], num_samples)
    assert thresholds[-1] == -torch.inf
