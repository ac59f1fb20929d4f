"""Files that are whole or not there."""

import pytest
import torch
from torch import nn

from checkpoint import Checkpoint, save_aside, write_aside


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_aside(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_aside(path, b"new")
    assert path.read_bytes() == b"old"


def test_goes_on_where_it_was(tmp_path) -> None:
    path, settings = tmp_path / "checkpoint.pt", {"seed": 1}
    model = nn.Linear(2, 2)
    checkpoint = Checkpoint(path, settings, resume=True)
    assert checkpoint.restore("arm", {"model": model}) == 0
    checkpoint.finish("first", {"model": model.state_dict()})
    checkpoint.save("arm", 3, {"model": model})
    resumed, other = Checkpoint(path, settings, resume=True), nn.Linear(2, 2)
    assert resumed.restore("another", {"model": other}) == 0
    assert resumed.restore("arm", {"model": other}) == 3
    assert torch.equal(model.weight, other.weight)
    assert list(resumed.finished) == ["first"]
    assert not Checkpoint(path, settings, resume=False).finished


def test_refuses_a_checkpoint_of_other_settings(tmp_path) -> None:
    save_aside(tmp_path / "c.pt", {"settings": {"seed": 1}, "finished": {}, "running": {}})
    with pytest.raises(ValueError, match="made with seed=1, not 2"):
        Checkpoint(tmp_path / "c.pt", {"seed": 2}, resume=True)
