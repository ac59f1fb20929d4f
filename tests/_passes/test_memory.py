"""A tensor is known by its memory, as long as that is as it was; on any device."""

import gc

import pytest
import torch

from reweight._passes.memory import Tokens, Trace, is_plain, memory_of


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_same_memory_is_the_same(device: str) -> None:
    tokens, x = Tokens(), torch.zeros(4, 6, device=device)
    token = tokens.of_argument(x)
    assert tokens.of(x) == token
    assert tokens.of(x.detach()) is None, "not before it is settled"
    tokens.settle()
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
    tokens.of_argument(x)
    tokens.settle()
    tokens.forget(x[:2])
    assert tokens.of(x) is None
    assert tokens.of(x.detach()) is None
    assert tokens.is_lost(x[2:])


def test_what_was_written_since_is_not_known_when_it_is_settled() -> None:
    """Its content may be put back, by way of its data, without a trace."""
    tokens, x = Tokens(), torch.zeros(4)
    token = tokens.of_argument(x)
    x.add_(1)
    assert tokens.of_argument(x) != token
    x.data.zero_()
    tokens.settle()
    assert tokens.of(x) is None


def test_copies_take_the_place_of_what_they_are_copied_of() -> None:
    tokens, x, y = Tokens(), torch.zeros(4), torch.zeros(4)
    token = tokens.of_argument(x)
    tokens.of_argument(y)
    y.add_(1)
    copies = {id(each): each.clone() for each in (x, y)}
    tokens.settle(copies)
    x.add_(1)
    tokens.settle()
    assert tokens.of(copies[id(x)].detach()) == token
    assert tokens.of(x) is None
    assert tokens.of(copies[id(y)]) is None


def test_a_trace_keeps_nothing_alive() -> None:
    x = torch.arange(6.0).view(2, 3)
    trace = Trace(x[:, 1:])
    assert torch.equal(trace(), x[:, 1:])
    x.add_(1)
    assert trace() is None
    trace = Trace(x.clone())
    assert trace() is None


def test_what_is_plain() -> None:
    assert is_plain(torch.zeros(2, device="meta"))
    assert not is_plain(torch.zeros(2).to_sparse())
    assert not is_plain(torch.complex(torch.zeros(2), torch.ones(2)).conj())
