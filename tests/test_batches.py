"""Halves of batches, whatever the inputs are made of."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from reweight import balanced_split, swap_halves


def halves(inputs, target):
    return list(swap_halves([(inputs, target)]))


@pytest.mark.parametrize("size", [2, 3, 8, 9])
def test_each_half_trains_once_and_judges_once(size: int) -> None:
    (first, second), (third, fourth) = halves(torch.arange(size), torch.arange(size) + 10)
    for a, b in ((first, fourth), (second, third)):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert torch.cat([first[0], second[0]]).tolist() == list(range(size))
    assert len(first[1]) == (size + 1) // 2


def test_nested_inputs_are_cut_everywhere() -> None:
    inputs = {"ids": torch.zeros(4, 2), "more": (torch.zeros(4), [torch.zeros(4, 1)]), "flag": True}
    (train, _), _ = halves(inputs, torch.zeros(4))
    assert train[0]["ids"].shape == (2, 2)
    assert train[0]["more"][0].shape == (2,)
    assert train[0]["more"][1][0].shape == (2, 1)
    assert train[0]["flag"] is True


def test_a_single_sample_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="batch of 1, which cannot be halved; drop_last"):
        assert halves(torch.zeros(1, 2), torch.zeros(1)) == []


def test_bad_batches_are_named() -> None:
    with pytest.raises(ValueError, match=r"samples first, got a tuple of 2: torch.float32 \[2\]"):
        halves(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match=r"must be a pair \(inputs, target\), got a tuple of 3"):
        list(swap_halves([(torch.zeros(2), torch.zeros(2), torch.zeros(2))]))
    with pytest.raises(ValueError, match=r"float32 \[\] on cpu. A loader gives batches"):
        halves(torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(TypeError, match="got Tensor"):
        list(swap_halves([torch.zeros(2)]))


def test_halves_come_as_often_as_the_loader_does() -> None:
    loader = [(torch.arange(4.0), torch.arange(4))] * 3
    halves = swap_halves(loader)
    assert len(halves) == len(list(halves)) == len(list(halves)) == 6


class Inputs(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_what_holds_the_tensors_stays_what_it_is() -> None:
    x = torch.arange(4.0)
    (inputs, _), _ = next(iter(swap_halves([(Inputs(x, -x), x)])))
    assert type(inputs) is Inputs
    assert torch.equal(inputs.right, -x[:2])
    (inputs, _), _ = next(iter(swap_halves([({"both": (x, [x]), "mode": "train"}, x)])))
    assert type(inputs["both"]) is tuple
    assert type(inputs["both"][1]) is list
    assert inputs["mode"] == "train"


@pytest.mark.parametrize(
    ("samples", "words"), [(["a", "b"], "got texts"), (np.ones(2), "got a NumPy array")]
)
def test_samples_that_are_not_in_tensors_are_refused(samples: Any, words: str) -> None:
    x = torch.zeros(2)
    with pytest.raises(TypeError, match=words):
        list(swap_halves([({"x": x, "other": samples}, x)]))


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_split_holds_out_as_many_of_every_class_and_none_twice(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2, 5, (200,), generator=generator) * 3
    train, meta = balanced_split(labels, 4, generator)
    assert labels[meta].unique(return_counts=True)[1].tolist() == [4] * 7
    assert sorted([*train.tolist(), *meta.tolist()]) == list(range(200))
    other = balanced_split(labels, 4, generator)
    assert not torch.equal(other[1], meta)
    same = [balanced_split(labels.tolist(), 4, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(same[0][1], same[1][1])


def test_every_sample_is_held_out_as_often() -> None:
    labels = torch.tensor([0] * 4 + [1] * 8)
    held_out = torch.zeros(12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        held_out[balanced_split(labels, 2, generator)[1]] += 1
    expected = torch.tensor([1000.0] * 4 + [500.0] * 8)
    assert (held_out - expected).abs().max() < 5 * 1000**0.5  # five standard deviations


@pytest.mark.parametrize(
    ("labels", "per_class", "error", "message"),
    [
        ([0, 0, 1, 1, 1], 2, ValueError, "got 2 where class 0 has 2. Hold out fewer"),
        ([0.0, 1.0], 1, TypeError, "`labels` must be whole numbers, got torch.float32"),
        ([[0, 1]], 1, ValueError, r"`labels` must have the shape \[N\], got \[1, 2\]"),
        ([0, 0], 0, ValueError, "`per_class` must be at least 1"),
    ],
)
def test_what_cannot_be_split_is_named(labels, per_class, error, message) -> None:
    with pytest.raises(error, match=message):
        balanced_split(labels, per_class)
