"""The fused cross-entropy on a device: its parity with float64, its time and bandwidth."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from card.timing import MOST, Run, Step, medians_by_turns, warm
from cross_entropy import Result, contestants_on, usual_loop
from reweight import exit_cross_entropy

Row = dict[str, Any]
Shape = tuple[int, int, int]  # exits, rows, classes
Function = Callable[..., Result]

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# Of losses, confidences, gradients and tangents, all of the order of 1 or below: spacing of what is
# stored, and of float32's sums over so many classes.
TOLERANCES = {FLOAT: 2e-5, BRAIN: 8e-3, HALF: 1e-3}
# Each is three kernels to compile, up to a second each: every dtype, with and without smoothing,
# rows that share a program and rows of several blocks, aligned or not.
PARITY: list[tuple[Shape, torch.dtype, float]] = [
    ((2, 33, 1000), FLOAT, 0.0),
    ((2, 33, 1000), BRAIN, 0.0),
    ((3, 7, 10), FLOAT, 0.1),
    ((1, 3, 50257), BRAIN, 0.1),
    ((2, 5, 8193), FLOAT, 0.0),
    ((2, 33, 1000), HALF, 0.1),
    ((3, 7, 10), BRAIN, 0.0),
    ((2, 5, 32000), BRAIN, 0.0),
    ((1, 2, 2), FLOAT, 0.1),
]
TIMES: list[tuple[Shape, torch.dtype]] = [
    ((4, 8192, 1000), BRAIN),
    ((4, 4096, 50257), BRAIN),
    ((4, 8192, 1000), FLOAT),
    ((4, 4096, 50257), FLOAT),
    ((8, 512, 32000), BRAIN),
    ((12, 2048, 1000), FLOAT),
    ((5, 256, 10), FLOAT),
]
COMPILED = [TIMES[0], TIMES[1], TIMES[6]]  # some seconds each
SECONDS = 1.0  # of a case's times


def logits_of(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    num_exits, num_rows, num_classes = shape
    return [
        (3 * torch.randn(num_rows, num_classes, device=device)).to(dtype).requires_grad_()
        for _ in range(num_exits)
    ]


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parity(device: str, shape: Shape, dtype: torch.dtype, label_smoothing: float) -> Row:
    """Losses, confidences, gradients and tangents beside those of the composite in float64."""
    torch.manual_seed(0)
    logits = logits_of(shape, dtype, device)
    moved = [torch.randn_like(z) for z in logits]
    target = torch.randint(shape[2], (shape[1],), device=device)
    target[0] = -100
    weights = torch.rand(shape[1], shape[0], device=device)
    valid = target >= 0

    def run(of: torch.dtype, impl: str) -> dict[str, Tensor]:
        rows = [z.detach().to(of).requires_grad_() for z in logits]
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "impl": impl}
        found = exit_cross_entropy(rows, target, **options)
        gradients = torch.autograd.grad((found.losses * weights).sum(), rows)
        with forward_ad.dual_level():
            pairs = zip(rows, moved, strict=True)
            duals = [forward_ad.make_dual(z.detach(), dz.to(of)) for z, dz in pairs]
            again = exit_cross_entropy(duals, target, **options)
            tangents = forward_ad.unpack_dual(again.losses).tangent
        assert found.confidence is not None
        assert found.correct is not None
        return {
            "losses": found.losses.detach(),
            "confidence": found.confidence[valid],
            "correct": found.correct[valid].double(),
            "gradients": torch.stack(gradients),
            "tangents": tangents,
        }

    mine = run(dtype, "triton" if device == "cuda" else "torch")
    exact = run(torch.float64, "reference")
    errors = {
        name: float((mine[name].double() - of.double()).abs().max() / of.abs().max().clamp(min=1))
        for name, of in exact.items()
    }
    return {
        "case": f"parity {shape}, smoothing {label_smoothing}",
        "precision": named(dtype),
        "outcome": "exact" if max(errors.values()) <= TOLERANCES[dtype] else "wrong",
        **errors,
    }


def times(run: Run, shape: Shape, dtype: torch.dtype, contestants: dict[str, Function]) -> Row:
    """Milliseconds of the usual loop, how much faster the others are, and bytes per second."""
    torch.manual_seed(0)
    device = run.device
    logits = logits_of(shape, dtype, device)
    target = torch.randint(shape[2], (shape[1],), device=device)
    upstream = torch.rand(shape[1], shape[0], device=device) / shape[1]

    def step_of(function: Function) -> Step:
        def step() -> object:
            losses, *_ = function(logits, target)
            return torch.autograd.grad(losses, logits, upstream.to(losses.dtype))

        return step

    builds = {name: partial(step_of, function) for name, function in contestants.items()}
    steps, _, reasons = warm(builds, device, run.deadline)
    until = min(run.deadline, time.monotonic() + SECONDS)
    seconds, num_rounds = medians_by_turns(steps, device, until, 1 if run.tiny else MOST)
    # The least there is to move: each logit read, read again, and its gradient written.
    num_bytes = 3 * sum(z.numel() * z.element_size() for z in logits)
    loop = seconds.pop("usual loop")
    row = {
        "case": f"cross-entropy {shape}",
        "precision": named(dtype),
        "outcome": "measured",
        "loop ms": loop * 1e3,
        **{f"{name}, times as fast": loop / each for name, each in seconds.items()},
    }
    if "ours" in seconds:
        row["ours GB/s"] = num_bytes / seconds["ours"] / 1e9
    return {**row, "rounds": num_rounds, **reasons}


def compiled_times(run: Run, shape: Shape, dtype: torch.dtype) -> Row:
    """The same beside the compiler, anew: past its limit of recompilations it would run nothing."""
    from torch._dynamo.utils import counters  # loads the compiler

    torch.compiler.reset()
    counters.clear()
    some = {name: contestants_on(run.device)[name] for name in ("usual loop", "ours")}
    some["compiled loop"] = torch.compile(usual_loop, dynamic=False)
    row = times(run, shape, dtype, some)
    return {**row, "graphs compiled": counters["stats"]["unique_graphs"]}


def rows(run: Run) -> Iterator[Callable[[], Row]]:
    """Parity first, then times, then those of the compiler; the small run takes small shapes."""
    small = [((5, 256, 10), FLOAT), ((3, 64, 100), BRAIN)]
    for shape, dtype, label_smoothing in PARITY:
        yield partial(parity, run.device, shape, dtype, label_smoothing)
    contestants = dict(contestants_on(run.device))
    contestants.pop("compiled loop")
    for shape, dtype in small if run.tiny else TIMES:
        yield partial(times, run, shape, dtype, contestants)
    for shape, dtype in small if run.tiny else COMPILED:
        yield partial(compiled_times, run, shape, dtype)
