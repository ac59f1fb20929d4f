"""Seconds and bytes of something that runs on a device, and how long a stage may go on."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], object]

MOST = 9  # rounds of what takes turns


@dataclass(frozen=True)
class Run:
    """What a stage is given.

    Attributes:
        device: "cuda" or "cpu".
        tiny: small sizes, a few of each.
        folder: where Fashion-MNIST is, if not where it is looked for.
        deadline: when the stage is to have ended, by ``time.monotonic()``.
    """

    device: str
    tiny: bool
    folder: Path | None
    deadline: float

    def seconds_left(self) -> float:
        """Negative after the deadline."""
        return self.deadline - time.monotonic()


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, device: str, num_steps: int) -> float:
    """Per step, of so many that are given to the device without waiting in between."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    wait_for(device)
    return (time.perf_counter() - start) / num_steps


def warm(
    builds: Mapping[str, Callable[[], Step]], device: str, until: float
) -> tuple[dict[str, Step], dict[str, int | None], dict[str, str]]:
    """Steps that run, warm, what each holds at its peak, and why the others do not run.

    Args:
        builds: what makes each step, by name; the first has time in any case.
        device: where they run.
        until: when to begin with no other, by ``time.monotonic()``.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, int | None] = {}
    reasons: dict[str, str] = {}
    for name, build in builds.items():
        if steps and time.monotonic() > until:
            reasons[name] = "no time left"
            continue
        try:
            step = build()
            step()
            step()
            peaks[name] = peak_bytes(step, device)
        except Exception as error:  # of a compiler or a peer: the others go on
            reasons[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        steps[name] = step
    return steps, peaks, reasons


def medians_by_turns(
    steps: Mapping[str, Step], device: str, until: float, most: int
) -> tuple[dict[str, float], int]:
    """The median seconds per step of each, and of how many rounds, in which all take turns.

    Args:
        steps: by name, warm.
        device: where they run.
        until: when to begin with no other round but the first, by ``time.monotonic()``.
        most: rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    counts = dict.fromkeys(steps, 1)
    for _ in range(most):
        for name, step in steps.items():
            found[name].append(seconds_of(step, device, counts[name]))
            counts[name] = max(1, min(100, int(0.02 / found[name][-1])))  # a turn takes 20 ms
        if time.monotonic() > until:
            break
    num_rounds = min(map(len, found.values()))
    return {name: statistics.median(seconds) for name, seconds in found.items()}, num_rounds


def peak_bytes(step: Step, device: str) -> int | None:
    """The most that a warm step holds above what was there before; None on a CPU."""
    if device != "cuda":
        return None
    wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    wait_for(device)
    return torch.cuda.max_memory_allocated() - before
