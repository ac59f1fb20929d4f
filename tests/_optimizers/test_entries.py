"""Small parameters go through operations as one, and come apart as they were."""

import torch

from reweight._optimizers.entries import joined, parted, together


def test_small_ones_that_have_come_equally_far_go_together() -> None:
    small, large = torch.ones(2, 3), torch.ones(1 << 13)
    tensors = [small, large, small, small.half(), small]
    states = [{"step": 1}, {"step": 1}, {"step": 2}, {"step": 1}, {"step": 1}]
    assert together(tensors, states) == [[0, 4], [1], [2], [3]]


def test_joined_and_parted_is_the_same() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(0, 4), torch.randn(5)]
    parts = parted(joined(tensors), tensors)
    assert all(map(torch.equal, parts, tensors))
    assert joined(tensors[:1]) is tensors[0]
    assert parted(tensors[0], tensors[:1])[0] is tensors[0]
