"""The fused cross-entropy on a device: its parity with float64, its time and bandwidth."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from card.timing import medians_by_turns
from cross_entropy import SHAPES, contestants_on
from reweight import exit_cross_entropy

Row = dict[str, Any]

EDGES = [(1, 2, 2), (3, 7, 10), (2, 33, 1000), (2, 5, 8193), (1, 3, 50257)]
# Of losses, confidences and gradients, all of the order of 1 or below: spacing of what is stored,
# and of float32's sums over so many classes.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def logits_of(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    num_exits, num_rows, num_classes = shape
    return [
        (3 * torch.randn(num_rows, num_classes, device=device)).to(dtype).requires_grad_()
        for _ in range(num_exits)
    ]


def parity(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, label_smoothing: float
) -> Row:
    """Losses, confidences and gradients beside those of the composite in float64."""
    torch.manual_seed(0)
    logits = logits_of(shape, dtype, device)
    target = torch.randint(shape[2], (shape[1],), device=device)
    target[0] = -100
    weights = torch.rand(shape[1], shape[0], device=device)
    impl = "triton" if device == "cuda" else "torch"

    def run(rows: list[Tensor], impl: str) -> list[Tensor]:
        found = exit_cross_entropy(rows, target, label_smoothing=label_smoothing, impl=impl)
        gradients = torch.autograd.grad((found.losses * weights).sum(), rows)
        valid = target >= 0
        confidence, correct = found.confidence, found.correct
        assert confidence is not None
        assert correct is not None
        return [found.losses.detach(), confidence[valid], correct[valid].double(), *gradients]

    exact = run([z.detach().double().requires_grad_() for z in logits], "reference")
    errors = [
        float((mine.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1))
        for mine, theirs in zip(run(logits, impl), exact, strict=True)
    ]
    worst = max(errors)
    return {
        "case": f"parity {shape}, smoothing {label_smoothing}",
        "precision": str(dtype).removeprefix("torch."),
        "error": worst,
        "outcome": "exact" if worst <= TOLERANCES[dtype] else "wrong",
    }


def times(device: str, shape: tuple[int, int, int], dtype: torch.dtype, limit: float) -> Row:
    """Milliseconds of the usual loop, how much faster the others are, and bytes per second."""
    torch.manual_seed(0)
    logits = logits_of(shape, dtype, device)
    target = torch.randint(shape[2], (shape[1],), device=device)
    upstream = torch.rand(shape[1], shape[0], device=device) / shape[1]

    def step(function: Callable[..., Any]) -> object:
        losses, *_ = function(logits, target)
        return torch.autograd.grad(losses, logits, upstream.to(losses.dtype))

    contestants = dict(contestants_on(device))
    if limit < 1:
        contestants.pop("compiled loop")
    steps = {name: partial(step, function) for name, function in contestants.items()}
    seconds = medians_by_turns(steps, device, limit)
    # The least there is to move: each logit read, read again, and its gradient written.
    num_bytes = 3 * sum(z.numel() * z.element_size() for z in logits)
    loop = seconds.pop("usual loop")
    return {
        "case": f"cross-entropy {shape}",
        "precision": str(dtype).removeprefix("torch."),
        "outcome": "measured",
        "loop ms": loop * 1e3,
        **{f"{name}, times as fast": loop / each for name, each in seconds.items()},
        "ours GB/s": num_bytes / seconds["ours"] / 1e9,
    }


def rows(device: str, tiny: bool) -> Iterator[Callable[[], Row]]:
    """Parity first, then times; the small run takes a few of each."""
    for shape in EDGES[1:3] if tiny else [*EDGES, *SHAPES[:3]]:
        for dtype in TOLERANCES:
            for label_smoothing in (0.0, 0.1):
                yield partial(parity, device, shape, dtype, label_smoothing)
    larger = [] if tiny else [(4, 8192, 1000), (4, 4096, 50257)]
    for shape in SHAPES[:1] if tiny else [*SHAPES, *larger]:
        for dtype in [torch.float32] if tiny else [torch.float32, torch.bfloat16]:
            yield partial(times, device, shape, dtype, 0.1 if tiny else 1.5)
