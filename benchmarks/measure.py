"""Time and memory of contestants against each other, on a machine that does other things too."""

import gc
import multiprocessing
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=Hashable)


def seconds_by_turns(
    contestants: Mapping[T, tuple[Callable[[], object], int]],
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[T, list[float]]:
    """Seconds per step of each contestant in each round.

    All take their turn in every round, so that drift of the machine hits them alike, in an order
    drawn anew, so that none always follows the same other, and none pays for another's garbage.

    Args:
        contestants: step and steps per round, by name.
        num_rounds: how many to time; one more goes first and warms up.
        clock: with one thread, ``time.process_time`` leaves out what others on the machine take.
    """
    order = list(contestants)
    seconds: dict[T, list[float]] = {name: [] for name in order}
    generator = random.Random(0)
    for _ in range(num_rounds + 1):
        generator.shuffle(order)
        for name in order:
            step, num_steps = contestants[name]
            gc.collect()
            start = clock()
            for _ in range(num_steps):
                step()
            seconds[name].append((clock() - start) / num_steps)
    return {name: values[1:] for name, values in seconds.items()}


def median_ratios(seconds: Mapping[T, list[float]], to: T) -> dict[T, float]:
    """The median over the rounds of each one's ratio to another in the same round."""
    return {
        name: statistics.median(
            mine / other for mine, other in zip(values, seconds[to], strict=True)
        )
        for name, values in seconds.items()
    }


def peak_memory(measure: Callable[..., int], *arguments: Any) -> int:
    """What ``measure`` finds in a process of its own, where freed tensors are given back.

    Else glibc's heap keeps some: a tenth more or less from run to run.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read when a process starts
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def peak_of(step: Callable[[], object]) -> int:
    """Peak resident set of two steps above what it was before, in kB."""

    def high_water() -> int:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found.group(1))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = high_water()
    step()
    step()
    return high_water() - before
