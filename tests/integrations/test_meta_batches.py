"""Meta batches without an end: whose they are, and in which order."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from reweight.integrations.meta_batches import meta_batches

LOADER = DataLoader(TensorDataset(torch.arange(10)), 2, shuffle=True)


def drawn(num: int, start: int = 0, rank: int = 0, ranks: int = 1, seed: int = 0):
    args = SimpleNamespace(
        process_index=rank, world_size=ranks, seed=seed, device=torch.device("cpu")
    )
    batches = meta_batches(LOADER, args, start)
    return [next(batches)[0].tolist() for _ in range(num)]


def test_go_on_where_they_were() -> None:
    """Whatever else is drawn meanwhile, and over the end of the loader."""
    torch.manual_seed(1)
    whole = drawn(12)
    torch.manual_seed(2)
    assert drawn(8, start=4) == whole[4:]
    passes = [sorted(x for batch in part for x in batch) for part in (whole[:5], whole[5:10])]
    assert passes == [list(range(10))] * 2
    assert whole[:5] != whole[5:10]
    assert drawn(12, seed=1) != whole


def test_each_process_takes_its_own() -> None:
    whole, ranks = drawn(12), [drawn(6, rank=rank, ranks=2) for rank in (0, 1)]
    assert [batch for both in zip(*ranks, strict=True) for batch in both] == whole
    assert drawn(4, start=2, rank=1, ranks=2) == ranks[1][2:]


def test_draw_from_no_state_but_their_own() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    drawn(7)
    assert torch.equal(torch.rand(3), wanted)


def test_an_iterator_ends() -> None:
    args = SimpleNamespace(process_index=0, world_size=1, seed=0, device=torch.device("cpu"))
    batches = meta_batches(iter([1]), args, 0)
    assert next(batches) == 1
    with pytest.raises(ValueError, match="`meta` must begin anew"):
        next(batches)
