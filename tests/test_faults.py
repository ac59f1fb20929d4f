"""A rank that is lost, or has nothing to judge by, ends the others with an error; none hangs."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fault_training
from fault_training import (
    reported,
    train_until_killed,
    train_with_restarts,
    train_without_meta_samples,
)
from properties import assert_same

NUM_EVENTS = 24  # of a step; asserted


def run(folder: Path, function, *args) -> list[str]:
    """What became of the two ranks: nothing if one was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reweight"])  # so that PyTorch is loaded once
    processes = [
        context.Process(target=reported, args=(rank, str(folder), function, *args))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)  # the time-out of the process group is 5 seconds
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    files = [folder / str(rank) for rank in range(2)]
    return [file.read_text() if file.exists() else "" for file in files]


def test_steps_have_the_events_that_the_next_test_goes_through(tmp_path) -> None:
    assert run(tmp_path, train_until_killed, -1) == [str(NUM_EVENTS)] * 2


@pytest.mark.parametrize("event", range(NUM_EVENTS + 1))
def test_a_rank_that_is_killed_ends_the_other_with_an_error(tmp_path, event) -> None:
    survivor, lost = run(tmp_path, train_until_killed, event)
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
    assert run(undisturbed, train_with_restarts) == ["None"] * 2
    command = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1"
    subprocess.run(
        [sys.executable, "-m", *command.split(), fault_training.__file__, restarted],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert (undisturbed / "began 0").read_text() == "0"
    assert (restarted / "began 0").read_text() == (restarted / "began 1").read_text() == "2"
    ours, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True)
        for folder in (restarted, undisturbed)
    )
    assert_same(ours, theirs)
