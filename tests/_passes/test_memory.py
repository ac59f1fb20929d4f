"""A tensor is known by its memory, as long as that is as it was; on any device."""

import gc

import pytest
import torch

from reweight._passes.memory import Tokens, Trace, is_plain, memory_of


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_same_memory_is_the_same(device: str) -> None:
    tokens, x = Tokens(), torch.zeros(4, 6, device=device)
    token = tokens.new(x)
    assert tokens.of(x.detach()) == tokens.of(x.view(4, 6)) == token
    assert tokens.of(x.t()) is None
    assert tokens.of(x[1:]) is None
    assert tokens.of(torch.zeros_like(x)) is None
    assert memory_of(x[1:]) == memory_of(x) != memory_of(x.clone())
    x[0].add_(1)
    assert tokens.of(x) is None


def test_what_has_gone_is_not_known_by_what_lies_in_its_place() -> None:
    tokens = Tokens()
    for _ in range(20):
        x = torch.zeros(1000)
        assert tokens.of(x) is None
        tokens.new(x)
        del x
        gc.collect()


def test_memory_that_is_forgotten() -> None:
    tokens, x = Tokens(), torch.zeros(4)
    tokens.new(x)
    tokens.forget(x[:2])
    assert tokens.of(x) is None
    assert tokens.is_lost(Trace(x))


def test_a_trace_keeps_nothing_alive() -> None:
    x = torch.arange(6.0).view(2, 3)
    trace = Trace(x[:, 1:])
    assert torch.equal(trace(), x[:, 1:])
    x.add_(1)
    assert not trace.is_there()
    trace = Trace(x.clone())
    assert not trace.is_there()


def test_what_is_plain() -> None:
    assert is_plain(torch.zeros(2, device="meta"))
    assert not is_plain(torch.zeros(2).to_sparse())
    assert not is_plain(torch.complex(torch.zeros(2), torch.ones(2)).conj())
