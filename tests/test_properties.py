"""The pure functions on whatever Hypothesis thinks of."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reweight import ExitLosses, SampleReweighter, choose_exits, exit_shares, find_thresholds
from reweight.budget import allot, quotas

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


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(2, 5)).flatmap(
        lambda shape: arrays("float64", shape, elements=st.floats(0, 1e6))
    ),
    st.sampled_from(["tanh", "sigmoid"]),
    st.sampled_from(["exits", "samples", "both"]),
    st.floats(0, 2),
)
def test_weights_average_one_whatever_the_losses(losses, form, average_over, strength) -> None:
    losses = torch.from_numpy(losses)
    options = {"strength": strength} if form == "tanh" else {}
    reweighter = SampleReweighter(
        losses.shape[1], form=form, average_over=average_over, num_hidden=3, **options
    ).double()
    weights = reweighter(ExitLosses(losses))
    means = weights.mean({"exits": 1, "samples": 0, "both": (0, 1)}[average_over])
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-9)
