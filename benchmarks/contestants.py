"""The steps that the benchmarks compare, and how to time them against each other."""

import gc
import random
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam, Optimizer

from nets import NETS, OPTIMIZERS, Batch, Net
from peers import PEERS, Build, Step
from reweight import MetaReweightStep, SampleReweighter

MODES: dict[str, dict[str, object]] = {
    "forward": {"estimator": "forward"},
    "forward, interval 10": {"estimator": "forward", "interval": 10},
    "finite differences": {"estimator": "finite_difference"},
    "unrolled": {"estimator": "unrolled"},
}
UNSUPPORTED = {("higher", "adamw")}
T = TypeVar("T", bound=Hashable)


def plain(
    model: nn.Module, optimizer: Optimizer, g: SampleReweighter, g_optimizer: Optimizer
) -> Step:
    """Conventional training of all exits, as one writes it without this library."""

    def step(train: Batch, meta: Batch) -> None:
        optimizer.zero_grad()
        target = train[1].flatten()
        losses = [F.cross_entropy(logits.flatten(0, -2), target) for logits in model(train[0])]
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def ours(
    model: nn.Module,
    optimizer: Optimizer,
    g: SampleReweighter,
    g_optimizer: Optimizer,
    **options: object,
) -> Step:
    return MetaReweightStep(model, optimizer, g, reweighter_optimizer=g_optimizer, **options)  # type: ignore[arg-type]


CONTESTANTS: dict[str, Build] = {
    "plain": plain,
    **{f"ours, {mode}": partial(ours, **options) for mode, options in MODES.items()},
    **PEERS,
}


def contestant(net: str | Net, optimizer_name: str, name: str) -> tuple[Callable[[], object], int]:
    """A step to call, and how many calls make one round of it.

    Args:
        net: one, or its name.
        optimizer_name: one of ``OPTIMIZERS``.
        name: one of ``CONTESTANTS``.
    """
    torch.manual_seed(0)
    net = NETS[net] if isinstance(net, str) else net
    model = net.build()
    g = SampleReweighter(net.num_exits)
    g_optimizer = Adam(g.parameters(), lr=1e-4, weight_decay=1e-4)
    step = CONTESTANTS[name](model, OPTIMIZERS[optimizer_name](model), g, g_optimizer)
    return partial(step, net.batch(), net.batch()), getattr(step, "interval", 1)


def seconds_by_turns(
    contestants: Mapping[T, tuple[Callable[[], object], int]], num_rounds: int
) -> dict[T, list[float]]:
    """Seconds per step of each contestant in each round.

    All take their turn in every round, so that drift of the machine hits them alike, in an order
    drawn anew, so that none always follows the same other, and none pays for another's garbage.

    Args:
        contestants: step and steps per round, by name.
        num_rounds: how many to time; one more goes first and warms up.
    """
    order = list(contestants)
    seconds: dict[T, list[float]] = {name: [] for name in order}
    generator = random.Random(0)
    for _ in range(num_rounds + 1):
        generator.shuffle(order)
        for name in order:
            step, num_steps = contestants[name]
            gc.collect()
            start = time.perf_counter()
            for _ in range(num_steps):
                step()
            seconds[name].append((time.perf_counter() - start) / num_steps)
    return {name: values[1:] for name, values in seconds.items()}
