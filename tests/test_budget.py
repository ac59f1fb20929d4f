"""Allotment, thresholds and the curve against slow twins; costs against counting by hand."""

import math
import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from references import allot_slowly, thresholds_slowly
from reweight import (
    ExitLosses,
    anytime_accuracy,
    budgeted_curve,
    choose_exits,
    exit_costs,
    exit_cross_entropy,
    exit_shares,
    find_thresholds,
)
from reweight.budget import allot

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


class HeadsAtTheEnd(nn.Module):
    """All features first, then all exits, in-place and through views: costs must see through it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 2, 1, bias=False) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(2 * 4 * 4, 5) for _ in range(3)])
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = self.norm(conv(x)).relu_()
            features.append(x)
        return {"exits": [head(f.flatten(1)) for head, f in zip(self.heads, features, strict=True)]}


def test_costs_count_what_each_exit_needs_or_what_ran_before_it() -> None:
    model = HeadsAtTheEnd()
    model.norm.eval()
    buffers = [buffer.clone() for buffer in model.buffers()]
    conv, head = 2 * 2 * 16, 2 * 16 * 5
    costs = exit_costs(model, torch.zeros(1, 2, 4, 4), lambda outputs: outputs["exits"])
    assert costs == [conv + head, 2 * (conv + head), 3 * (conv + head)]
    in_order = exit_costs(
        model, torch.zeros(1, 2, 4, 4), lambda outputs: outputs["exits"], in_order=True
    )
    assert in_order == [3 * conv + head, 3 * conv + 2 * head, 3 * conv + 3 * head]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 2, 4, 4))
    assert costs[-1] == counter.get_total_flops() // 2
    assert all(map(torch.equal, buffers, model.buffers()))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.recurrence = nn.LSTM(8, 8, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x, mask=None):
        early = self.layer(x)
        late, _ = self.recurrence(early)
        return [head(z) for head, z in zip(self.heads, (early, late), strict=True)]


def test_costs_of_attention_and_recurrence_are_those_counted_by_hand() -> None:
    tokens, width, hidden = 5, 8, 16
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    layer = attention + 2 * tokens * width * hidden
    recurrence = 2 * 4 * tokens * width * width
    head = tokens * width * 3
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for inputs in (torch.zeros(1, 5, 8), (torch.zeros(1, 5, 8),), {"x": torch.zeros(1, 5, 8)}):
        costs = exit_costs(Attends(), inputs)
        assert costs == [layer + head, layer + head + recurrence + head]
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()


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


def test_costs_leave_the_modes_of_the_model_as_they_were() -> None:
    model = HeadsAtTheEnd()
    model.norm.eval()
    exit_costs(model, torch.zeros(1, 2, 4, 4), lambda outputs: outputs["exits"])
    assert model.training
    assert not model.norm.training
    with pytest.raises(TypeError, match="Pass `exits=`"):
        exit_costs(model, torch.zeros(1, 2, 4, 4))
    assert model.training


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
