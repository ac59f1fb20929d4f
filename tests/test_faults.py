"""A rank that is lost, or has nothing to judge by, ends the others with an error; none hangs."""

import signal
from pathlib import Path

import pytest
import torch

import fault_training
from fault_training import (
    reported,
    train_until_lost,
    train_with_restarts,
    train_without_meta_samples,
)
from properties import assert_same
from ranks import run_ranks, run_torchrun


def run(folder: Path, function, *args, seconds: float = 30) -> list[str]:
    """What became of the two ranks: nothing if one was killed."""
    run_ranks(2, reported, str(folder), seconds, function, *args, seconds=60)
    files = [folder / str(rank) for rank in range(2)]
    return [file.read_text() if file.exists() else "" for file in files]


@pytest.fixture(scope="module")
def num_events(tmp_path_factory):
    """How many there are in a step of either kind: before and after every collective, and more."""
    found = {}
    for kind in NUM_PARTS:
        folder = tmp_path_factory.mktemp(kind)
        one, other = run(folder, train_until_lost, kind, -1, signal.SIGKILL)
        assert one == other
        found[kind] = int(one)
    return found


# Of DistributedDataParallel every event is gone through, of fully_shard every eighth of the step.
NUM_PARTS = {"DistributedDataParallel": 24, "fully_shard": 8}


def test_steps_have_the_events_that_the_next_test_goes_through(num_events) -> None:
    assert num_events["DistributedDataParallel"] == NUM_PARTS["DistributedDataParallel"]
    assert num_events["fully_shard"] > 2 * NUM_PARTS["fully_shard"]


@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, n in NUM_PARTS.items() for part in range(n + 1)]
)
def test_a_rank_that_is_killed_ends_the_other_with_an_error(
    num_events, tmp_path, kind, part
) -> None:
    event = part * num_events[kind] // NUM_PARTS[kind]
    survivor, lost = run(tmp_path, train_until_lost, kind, event, signal.SIGKILL)
    assert "Error" in survivor.split(":")[0], survivor
    assert not lost


def test_a_rank_without_meta_samples_is_told_and_ends_the_other(tmp_path) -> None:
    told, other = run(tmp_path, train_without_meta_samples)
    assert told.startswith("ValueError: `meta` must hold at least one sample")
    assert "Error" in other.split(":")[0], other


def test_a_restart_goes_on_from_the_checkpoint_to_the_same_end(tmp_path) -> None:
    undisturbed, restarted = tmp_path / "undisturbed", tmp_path / "restarted"
    undisturbed.mkdir()
    restarted.mkdir()
    assert run(undisturbed, train_with_restarts, str(undisturbed)) == ["None"] * 2
    command = ["--max-restarts=1", fault_training.__file__, str(restarted)]
    run_torchrun(tmp_path / "output", *command, seconds=120)
    assert (undisturbed / "began 0").read_text() == "0"
    assert (restarted / "began 0").read_text() == (restarted / "began 1").read_text() == "2"
    ours, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True)
        for folder in (restarted, undisturbed)
    )
    assert_same(ours, theirs)
