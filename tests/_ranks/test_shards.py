"""Models of fully_shard train as whole ones do; checkpoints move between numbers of ranks."""

import pytest
import torch

from distributed_cases import train
from fsdp_cases import (
    ACCURACY,
    CASES,
    FAILURES,
    KINDS,
    load_checkpoint,
    run,
    save_checkpoint,
)
from ranks import process_group, run_ranks

NUM_RANKS = 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank saves, and goes on to; then what it makes of what two have saved."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    with process_group(0, 1, f"file://{folder}/store1"):
        yield folder, {kind: save_checkpoint(folder, kind, 0, 1) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks(alone):
    """What came of everything on each rank."""
    folder, _ = alone
    run_ranks(NUM_RANKS, run, NUM_RANKS, folder, seconds=400)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(NUM_RANKS)]


def assert_all_near(ranks, key, expected, tolerance=1e-10) -> None:
    for results in ranks:
        assert not isinstance(results[key], str), results[key]
        torch.testing.assert_close(results[key], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_shards_train_as_whole_parameters(ranks, name) -> None:
    # Sums in another order; a difference quotient magnifies rounding by 1/h.
    tolerance = 1e-4 if name == "finite differences" else 1e-10
    assert_all_near(ranks, name, train(CASES[name], None, NUM_RANKS), tolerance)
    assert torch.equal(ranks[0][name]["vectors"], ranks[1][name]["vectors"])


@pytest.mark.parametrize("failure", FAILURES)
def test_a_step_that_failed_can_be_taken_again(ranks, failure) -> None:
    undisturbed = ranks[0]["", 0, failure[-1]]
    assert_all_near(ranks, failure, undisturbed, tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_one_rank_goes_on_with_two(alone, ranks, kind) -> None:
    _, expected = alone
    assert_all_near(ranks, ("load", kind), expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_ranks_goes_on_with_one(alone, ranks, kind) -> None:
    found = load_checkpoint(alone[0], kind, NUM_RANKS, 0, 1)
    assert_all_near(ranks, ("save", kind), found)


@pytest.mark.parametrize(("precision", "estimator"), ACCURACY)
def test_low_precision_is_as_near_as_the_documentation_says(ranks, precision, estimator) -> None:
    for results in ranks:
        assert results[precision, estimator] < ACCURACY[precision, estimator]


def test_what_does_not_fit_is_refused(ranks) -> None:
    assert [results["refused"] for results in ranks] == [None, None]
