"""Seconds and bytes of something that runs on a device."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], device: str, num_steps: int) -> float:
    """Per step, of so many that are given to the device without waiting in between."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    wait_for(device)
    return (time.perf_counter() - start) / num_steps


def medians_by_turns(
    steps: Mapping[str, Callable[[], object]], device: str, limit: float, num_rounds: int = 7
) -> dict[str, float]:
    """The median seconds per step of each; all take turns, for about so many seconds in all."""
    first = {name: seconds_of(step, device, 1) for name, step in steps.items()}
    first = {name: seconds_of(step, device, 1) for name, step in steps.items()}  # it is warm now
    share = limit / len(steps) / num_rounds
    counts = {name: max(1, min(200, int(share / seconds))) for name, seconds in first.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            found[name].append(seconds_of(step, device, counts[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most that a step holds above what was there before; None on a CPU."""
    if device != "cuda":
        return None
    step()
    wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    wait_for(device)
    return torch.cuda.max_memory_allocated() - before
