"""Small parameters go through operations as one, and come apart as they were."""

import torch

from reweight._optimizers.entries import joined, parted, together


def test_small_ones_that_are_alike_go_together() -> None:
    small, large = torch.ones(2, 3), torch.ones(1 << 13)
    assert together([small, large, small, small.half(), small.T]) == [[0, 2], [1], [3], [4]]


def test_joined_and_parted_is_the_same() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(0, 4), torch.randn(5)]
    parts = parted(joined(tensors), tensors)
    assert all(map(torch.equal, parts, tensors))
    assert joined(tensors[:1]) is tensors[0]
    assert parted(tensors[0], tensors[:1])[0] is tensors[0]
