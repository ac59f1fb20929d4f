"""Halves of batches, whatever the inputs are made of."""

import pytest
import torch

from reweight import swap_halves


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
    with pytest.raises(ValueError, match="same number of samples, got 2, 3"):
        halves(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match=r"must be a pair \(inputs, target\), got a tuple of 3"):
        list(swap_halves([(torch.zeros(2), torch.zeros(2), torch.zeros(2))]))
    with pytest.raises(ValueError, match="same number of samples, got 0, 2"):
        halves(torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(TypeError, match="got Tensor"):
        list(swap_halves([torch.zeros(2)]))
