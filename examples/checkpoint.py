"""Files that are whole or not there: written aside, then renamed over what stood before."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


def write_aside(path: Path, content: bytes) -> None:
    """Put the content at the path in one go: a process killed at any moment leaves old or new."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def save_aside(path: Path, content: Any) -> None:
    """``torch.save``, in one go."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_aside(path, buffer.getvalue())


class Stateful(Protocol):
    """Models, optimizers, schedulers, steps: what can be put down and taken up again."""

    def state_dict(self) -> Any:
        """Its state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take up a state."""


class Checkpoint:
    """How far a run has come: what is finished, and the training under way.

    Args:
        path: the file.
        settings: what the run depends on; a checkpoint of other settings is refused.
        resume: go on from the file if it is there, else begin anew.
        writes: whether to write it; of several processes that train together, one does.

    Raises:
        ValueError: the file belongs to other settings.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, resume: bool, writes: bool = True
    ) -> None:
        self._path, self._writes = path, writes
        self._content: dict[str, Any] = {"settings": dict(settings), "finished": {}, "running": {}}
        if resume and path.exists():
            content = torch.load(path, weights_only=True)
            for name, value in settings.items():
                before = content["settings"].get(name)
                if before != value:
                    raise ValueError(
                        f"{path} was made with {name}={before}, not {value}; give the same "
                        "settings, or leave --resume away to begin anew"
                    )
            self._content = content

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """What each finished training has left, by name."""
        finished: dict[str, dict[str, Any]] = self._content["finished"]
        return finished

    def restore(self, name: str, parts: Mapping[str, Stateful]) -> int:
        """Take up the training of that name; returns the epoch to begin with."""
        running = self._content["running"]
        if running.get("name") != name:
            return 0
        for part, stateful in parts.items():
            stateful.load_state_dict(running["parts"][part])
        return int(running["epoch"])

    def save(self, name: str, epoch: int, parts: Mapping[str, Stateful]) -> None:
        """Put down a training after so many epochs."""
        states = {part: stateful.state_dict() for part, stateful in parts.items()}
        self._content["running"] = {"name": name, "epoch": epoch, "parts": states}
        self._write()

    def finish(self, name: str, result: dict[str, Any]) -> None:
        """Put down what a finished training leaves."""
        self._content["finished"][name] = result
        self._content["running"] = {}
        self._write()

    def _write(self) -> None:
        if self._writes:
            save_aside(self._path, self._content)
