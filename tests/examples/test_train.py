"""The example run as a user runs it: its files, its refusals, and a resume after kill -9."""

import contextlib
import csv
import io
import json
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import train
from ranks import forked, run_torchrun
from reweight import SampleReweighter

SCRIPT = Path(train.__file__)
SETTINGS = [
    *("--data", "digits", "--train-size", "128", "--model", "mlp"),
    *("--epochs", "3", "--batch-size", "16"),
]


class Lines(io.StringIO):
    """Sends on what is printed."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def write(self, text: str) -> int:
        self._connection.send(text)
        return len(text)


def run(connection: Connection, out: Path) -> None:
    """The example in a process of its own."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)  # as in this process, for bitwise the same
    sys.stdout = Lines(connection)
    train.main([*SETTINGS, "--out", str(out)])


def start(out: Path) -> tuple[BaseProcess, Connection]:
    """A process, of which each has what it prints."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = forked(run, sender, out)
    sender.close()
    return process, receiver


def finish(process: BaseProcess, receiver: Connection) -> str:
    output = "".join(printed(receiver))
    process.join()
    assert process.exitcode == 0, output
    return output


def printed(receiver: Connection) -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while True:
            yield receiver.recv()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    finish(*start(out))
    return out


def test_writes_everything_that_can_be_read_back(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {
        "budgeted.png",
        "checkpoint.pt",
        "conventional.pt",
        "results.csv",
        "results.json",
        "reweighted.pt",
        "weights.png",
    }
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["settings"]["seed"] == 0
    assert results["settings"]["train_size"] == 128
    num_exits = len(results["multiply_adds"])
    for arm in train.ARMS:
        assert len(results["arms"][arm]["anytime_accuracy"]) == num_exits
        points = results["arms"][arm]["budgeted"]
        assert len(points) == 39
        assert all(len(point["thresholds"]) == num_exits - 1 for point in points)
        saved = torch.load(undisturbed / f"{arm}.pt", weights_only=True)
        assert list(saved["thresholds"]) == [point["power"] for point in points]
    with (undisturbed / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (num_exits + 39)
    assert {row["epochs"] for row in rows} == {"3"}
    accuracies = [float(row["accuracy"]) for row in rows if row["exit"] == "1"]
    assert min(accuracies) > 0.2  # of ten classes, after three short epochs with wrong labels


def test_arms_begin_and_go_on_alike(tmp_path, monkeypatch) -> None:
    """With weights of 1 the reweighted arm is the conventional one, bitwise."""
    monkeypatch.setattr(
        train, "reweighter_for", lambda num_exits, *_: SampleReweighter(num_exits, strength=0)
    )
    train.main([*SETTINGS, "--out", str(tmp_path)])
    models = [torch.load(tmp_path / f"{a}.pt", weights_only=True)["model"] for a in train.ARMS]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


@pytest.mark.parametrize(
    "killed_after", ["conventional: epoch 1", "conventional: epoch 3", "reweighted: epoch 2"]
)
def test_kill_and_resume_end_bitwise_the_same(killed_after, undisturbed, tmp_path, capsys) -> None:
    process, receiver = start(tmp_path / "out")
    for line in printed(receiver):  # then at whatever it is doing: writing, training, beginning
        if killed_after in line:
            break
    process.kill()
    process.join()
    assert process.exitcode == -9
    train.main([*SETTINGS, "--out", str(tmp_path / "out"), "--resume"])
    output = capsys.readouterr().out
    if killed_after != "conventional: epoch 1":
        assert "conventional: epoch 1" not in output
    for arm in train.ARMS:
        ours, theirs = (
            torch.load(out / f"{arm}.pt", weights_only=True)
            for out in (tmp_path / "out", undisturbed)
        )
        for name, tensor in theirs["model"].items():
            assert torch.equal(ours["model"][name], tensor), name
    for name in ("results.json", "results.csv", "weights.png"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / name).read_bytes()


def test_two_processes_make_the_same_table(undisturbed, tmp_path) -> None:
    """The perceptron has no BatchNorm: split batches give what whole ones do, but for rounding."""
    out = tmp_path / "out"
    command = [str(SCRIPT), *SETTINGS, "--out", str(out)]
    printed = run_torchrun(tmp_path / "output", *command, seconds=120)
    assert printed.count("test accuracy (%)") == 1  # one process alone speaks
    assert printed.count("reweighted: epoch 3 of 3") == 1
    for arm in train.ARMS:
        ours, theirs = (
            torch.load(out / f"{arm}.pt", weights_only=True)["model"]
            for out in (tmp_path / "out", undisturbed)
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    ours, theirs = (
        json.loads((out / "results.json").read_text())["arms"]
        for out in (tmp_path / "out", undisturbed)
    )
    for arm in train.ARMS:
        assert ours[arm]["anytime_accuracy"] == pytest.approx(
            theirs[arm]["anytime_accuracy"], abs=0.005
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10", "--data-dir", "nowhere"], "cifar-10-binary.tar.gz.*--download"),
        (["--label-noise", "2"], "label_noise"),
        (["--batch-size", "300"], "--batch-size must be at most 128"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--form", "direct", "--interval", "3"], "--interval must be 1 for direct weights"),
        (["--data", "imagefolder", "--model", "msdnet"], "use --model conv"),
        (["--resume", "--seed", "7"], "made with seed=0, not 7"),
    ],
)
def test_refusals_say_what_to_do(arguments, message, undisturbed, capsys) -> None:
    with pytest.raises(SystemExit) as refusal:
        train.main([*SETTINGS, "--out", str(undisturbed), *arguments])
    said = str(refusal.value) + capsys.readouterr().err
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objective", "mean", "--interval", "3", "--label-noise", "0.2"],
        ["--reweighter-input", "both", "--label-noise", "0", "--long-tail", "5"],
        ["--noise", "neighbour", "--meta-size", "50", "--amp"],
        ["--form", "direct", "--optimizer", "adamw", "--seed", "3"],
    ],
)
def test_options_do_something(arguments, undisturbed, tmp_path) -> None:
    train.main([*SETTINGS, *arguments, "--out", str(tmp_path)])
    ours, plain = (
        torch.load(out / "reweighted.pt", weights_only=True)["model"]
        for out in (tmp_path, undisturbed)
    )
    assert not all(torch.equal(ours[name], plain[name]) for name in plain)
