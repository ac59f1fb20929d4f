"""n ranks on split data are one process on all of it."""

import multiprocessing

import pytest
import torch

from distributed_cases import CASES, run, train


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, tmp_path_factory):
    """What came of every case on each rank."""
    folder, num_ranks = tmp_path_factory.mktemp("ranks"), request.param
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=run, args=(rank, num_ranks, str(folder)))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [torch.load(folder / f"{num_ranks}-{rank}.pt") for rank in range(num_ranks)]


@pytest.mark.parametrize("name", CASES)
def test_split_data_train_as_joined(ranks, name) -> None:
    expected = train(CASES[name], None, len(ranks))
    for results in ranks:
        assert name in results, "an earlier case failed"
        assert not isinstance(results[name], str), results[name]
        for key, values in results[name].items():
            # Sums in another order; a difference quotient magnifies rounding by 1/h.
            tolerance = 1e-4 if name == "finite differences" else 1e-10
            torch.testing.assert_close(values, expected[key], rtol=tolerance, atol=tolerance)
        assert torch.equal(results[name]["vectors"], ranks[0][name]["vectors"])
