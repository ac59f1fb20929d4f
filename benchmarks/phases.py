"""Where the time of a step in forward mode goes, phase by phase, against the count.

A forward counts 1, a backward 2, the forward-mode pass 2 (a product each for the tangents of weight
and input; the values are those of the first forward), in units of a third of the plain step's
forward and backward.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.optim import Adam

import reweight._optimizers.pseudo_update
from nets import NETS, OPTIMIZERS, Net
from reweight import MetaReweightStep, SampleReweighter, exit_cross_entropy

# What ends each phase, its name, and its count; the order is that of the step.
PHASES = [
    ("model", "state put aside", 0),
    ("losses", "1 forward", 1),
    ("weights", "1 weights", 0),
    ("update", "1 backward", 2),
    ("updated", "2 pseudo update", 0),
    ("model", "3 parameters put in place", 0),
    ("losses", "3 meta forward", 1),
    ("cotangents", "3 meta backward", 2),
    ("model", "3 back through the update", 0),
    ("losses", "4 forward-mode pass", 2),
    ("reweighter", "5 back through the reweighter", 0),
    ("weights", "5 reweighter's step", 0),
    ("optimizer", "6 backward", 2),
    ("end", "6 optimizer", 0),
]
PLAIN_PHASES = [("plain forward", 1), ("plain backward", 2), ("plain optimizer", 0)]
UPDATE = ("2 pseudo update", "3 back through the update")


def phase_seconds(net: Net, optimizer_name: str, num_rounds: int) -> dict[str, float]:
    """Median seconds of each phase, of the plain step and of ours, which take turns."""
    torch.manual_seed(0)
    train, meta = net.batch(), net.batch()
    model = net.build()
    optimizer = OPTIMIZERS[optimizer_name](model)
    g = SampleReweighter(net.num_exits)
    g_optimizer = Adam(g.parameters(), lr=1e-4, weight_decay=1e-4)
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    def marked(name: str, function: Callable[..., Any], before: str = "") -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if before:
                mark(before)
            result = function(*args, **kwargs)
            mark(name)
            return result

        return call

    def update(*args: Any, **kwargs: Any) -> Any:
        result = reweight._optimizers.pseudo_update.pseudo_update(*args, **kwargs)
        last = list(result.parameters.values())[-1]  # what the way back through U begins with
        if last.requires_grad:
            last.register_hook(lambda _: mark("cotangents"))
        return result

    step = MetaReweightStep(
        model,
        optimizer,
        g,
        reweighter_optimizer=g_optimizer,
        estimator="forward",
        loss=marked("losses", exit_cross_entropy),
    )

    def ours() -> list[float]:
        marks.clear()
        handles = [
            model.register_forward_pre_hook(lambda *_: mark("model")),
            g.register_forward_hook(lambda *_: mark("weights")),
            g_optimizer.register_step_pre_hook(lambda *_: mark("reweighter")),
            optimizer.register_step_pre_hook(lambda *_: mark("optimizer")),
        ]
        mark("begin")
        with patch(
            "reweight._meta.lookahead.pseudo_update", marked("updated", update, before="update")
        ):
            step(train, meta)
        mark("end")
        for handle in handles:
            handle.remove()
        found, expected = [name for name, _ in marks[1:]], [end for end, _, _ in PHASES]
        if found != expected:
            raise RuntimeError(f"The step goes another way than PHASES says: {found}")
        return [after - before for (_, before), (_, after) in pairwise(marks)]

    def plain() -> list[float]:
        times = [time.perf_counter()]
        optimizer.zero_grad()
        target = train[1].flatten()
        losses = [F.cross_entropy(logits.flatten(0, -2), target) for logits in model(train[0])]
        loss = torch.stack(losses).sum()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    rounds = [plain() + ours() for _ in range(num_rounds + 1)][1:]  # the first warms up
    names = [name for name, _ in PLAIN_PHASES] + [name for _, name, _ in PHASES]
    return dict(zip(names, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def print_profile(net: str, optimizer_name: str, num_rounds: int) -> None:
    seconds = phase_seconds(NETS[net], optimizer_name, num_rounds)
    unit = (seconds["plain forward"] + seconds["plain backward"]) / 3
    plain = sum(seconds[name] for name, _ in PLAIN_PHASES)
    rows = [*PLAIN_PHASES, *((name, count) for _, name, count in PHASES)]
    print(f"\n{net}, {optimizer_name}")
    print(f"{'phase':<32} {'ms':>8} {'of plain':>9} {'count':>6} {'measured/count':>15}")
    for name, count in rows:
        measured = f"{seconds[name] / unit / count:>15.2f}" if count else ""
        print(
            f"{name:<32} {1e3 * seconds[name]:>8.1f} {seconds[name] / plain:>9.3f} "
            f"{count or '':>6} {measured}"
        )
    total = sum(seconds[name] for _, name, _ in PHASES)
    count = sum(count for _, _, count in PHASES)
    print(
        f"{'all of the step':<32} {1e3 * total:>8.1f} {total / plain:>9.3f} {count:>6} "
        f"{total / unit / count:>15.2f}",
        flush=True,
    )
