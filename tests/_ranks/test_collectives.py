"""n ranks on split data are one process on all of it."""

import functools

import pytest
import torch

from distributed_cases import CASES, CHECKS, run, train
from ranks import run_ranks


@functools.cache
def train_joined(name: str, num_ranks: int):
    return train(CASES[name], None, num_ranks)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of every case and check, by number of ranks and name, for each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(4, run, str(folder), seconds=400)
    found = {}
    for rank in range(4):
        for key, result in torch.load(folder / f"{rank}.pt").items():
            found.setdefault(key, []).append(result)
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_split_data_train_as_joined(results, name, num_ranks) -> None:
    ranks = results[num_ranks, name]
    assert len(ranks) == num_ranks
    # One process makes no difference between the numbers of ranks, but where each rank allots.
    expected = train_joined(name, num_ranks if name == "allotment by each rank" else 4)
    for result in ranks:
        assert isinstance(result, dict), result
        for key, values in result.items():
            # Sums in another order; a difference quotient magnifies rounding by 1/h.
            tolerance = 1e-4 if name == "finite differences" else 1e-10
            torch.testing.assert_close(values, expected[key], rtol=tolerance, atol=tolerance)
        assert torch.equal(result["vectors"], ranks[0]["vectors"])


@pytest.mark.parametrize("name", CHECKS)
def test_four_ranks(results, name) -> None:
    assert results[4, name] == [None] * 4, "\n".join(map(str, results[4, name]))
