"""Per-exit cross-entropy against other ways to compute it, forward and backward.

One step computes the losses [B, K], confidence and correctness of every exit, and the gradient of
the weighted losses with respect to all logits (or hidden states and head). Time: the contestants
take turns, and the median over the rounds of the usual loop's time over each one's is printed.
Memory: each in a process of its own, peak resident set above what the inputs take, over the usual
loop's.

    python benchmarks/cross_entropy.py                # on the CPU; about six minutes on two cores
    python benchmarks/cross_entropy.py --threads 1 --time-only
    python benchmarks/cross_entropy.py --device cuda  # with Triton, and Liger where installed
    pytest benchmarks/cross_entropy.py --benchmark-only  # the same under pytest-benchmark
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from measure import median_ratios, peak_memory, peak_of, seconds_by_turns
from reweight import exit_cross_entropy, linear_exit_cross_entropy

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SHAPES = [(5, 256, 10), (7, 1024, 100), (5, 256, 1000), (12, 2048, 1000), (8, 512, 32000)]
LINEAR_SHAPE = (4, 512, 512, 32000)  # exits, rows, width, vocabulary
BYTES = """\
Bytes moved, in units of all logits: the usual loop reads or writes them 9 times (log_softmax 2,
softmax 2, max 1, and 4 in the backward); ours on the CPU, 4 (read and write, forward and backward);
ours in Triton, 3, the least there is (read; read and write)."""

Result = tuple[Tensor, Tensor, Tensor]


def usual_loop(logits: Sequence[Tensor], target: Tensor) -> Result:
    """As one writes it: a loss and a softmax for each exit."""
    losses, confidences, corrects = [], [], []
    for z in logits:
        losses.append(F.cross_entropy(z, target, reduction="none"))
        confidence, prediction = z.detach().softmax(1).max(1)
        confidences.append(confidence)
        corrects.append(prediction == target)
    return torch.stack(losses, 1), torch.stack(confidences, 1), torch.stack(corrects, 1)


@cache
def compiler() -> Callable[..., Result]:
    """Loaded when it is wanted."""
    return torch.compile(usual_loop, dynamic=False)


def compiled_loop(logits: Sequence[Tensor], target: Tensor) -> Result:
    """The usual loop as the compiler makes it."""
    return compiler()(logits, target)


def stacked_call(logits: Sequence[Tensor], target: Tensor) -> Result:
    """All exits as one matrix."""
    num_exits = len(logits)
    losses, confidence, correct = usual_loop([torch.cat(list(logits))], target.repeat(num_exits))
    return tuple(each.view(num_exits, -1).t() for each in (losses, confidence, correct))


def ours(logits: Sequence[Tensor], target: Tensor, impl: str = "auto") -> Result:
    """``exit_cross_entropy``."""
    return exit_cross_entropy(logits, target, impl=impl)[:3]


def liger(logits: Sequence[Tensor], target: Tensor) -> Result:
    """Liger's kernel for the losses; it knows no confidence, so the rest is as usual."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    _, confidence, correct = usual_loop([z.detach() for z in logits], target)
    losses = [liger_cross_entropy(z.clone(), target, reduction="none") for z in logits]
    return torch.stack(losses, 1), confidence, correct


def contestants_on(device: str) -> dict[str, Callable[[Sequence[Tensor], Tensor], Result]]:
    """Name → function; the first is what the others are compared with."""
    found = {
        "usual loop": usual_loop,
        "stacked call": stacked_call,
        "compiled loop": compiled_loop,
        "ours, reference": partial(ours, impl="reference"),
        "ours": ours,
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    return found


def step_of(shape: tuple[int, int, int], name: str, device: str = "cpu") -> Callable[[], object]:
    """One step of a contestant, on inputs of its own."""
    torch.manual_seed(0)
    num_exits, num_rows, num_classes = shape
    logits = [
        torch.randn(num_rows, num_classes, device=device, requires_grad=True)
        for _ in range(num_exits)
    ]
    target = torch.randint(num_classes, (num_rows,), device=device)
    weights = torch.rand(num_rows, num_exits, device=device)
    function = contestants_on(device)[name]

    def step() -> object:
        losses, *_ = function(logits, target)
        gradients = torch.autograd.grad((losses * weights).sum() / num_rows, logits)
        if device == "cuda":
            torch.cuda.synchronize()
        return gradients

    return step


def materialised(hidden: Sequence[Tensor], weight: Tensor, target: Tensor) -> Tensor:
    """The logits of all exits, then the usual loop."""
    return usual_loop([F.linear(h, weight) for h in hidden], target)[0]


def ours_linear(hidden: Sequence[Tensor], weight: Tensor, target: Tensor) -> Tensor:
    """``linear_exit_cross_entropy``, with all it returns."""
    return linear_exit_cross_entropy(hidden, weight, target).losses


def chunked(hidden: Sequence[Tensor], weight: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own, once for each exit; it knows neither confidence nor correctness."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.stack(
        [
            F.linear_cross_entropy(h, weight, target, reduction="none", options=options)
            for h in hidden
        ],
        1,
    )


LINEAR = {"materialised": materialised, "ours": ours_linear, "F.linear_cross_entropy": chunked}


def linear_step_of(name: str, device: str = "cpu") -> Callable[[], object]:
    """One step of a contestant of the linear form."""
    torch.manual_seed(0)
    num_exits, num_rows, width, vocabulary = LINEAR_SHAPE
    hidden = [torch.randn(num_rows, width, device=device) for _ in range(num_exits)]
    weight = torch.randn(vocabulary, width, device=device) / width**0.5
    inputs = [tensor.requires_grad_() for tensor in (*hidden, weight)]
    target = torch.randint(vocabulary, (num_rows,), device=device)
    weights = torch.rand(num_rows, num_exits, device=device)

    def step() -> object:
        losses = LINEAR[name](hidden, weight, target)
        gradients = torch.autograd.grad((losses * weights).sum() / num_rows, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return gradients

    return step


def peak_of_step(shape: tuple[int, int, int] | None, name: str) -> int:
    """Peak memory of two steps, in kB; in a process of its own."""
    step = step_of(shape, name) if shape else linear_step_of(name)
    step()  # loads and compiles the code, which is not what is asked for
    return peak_of(step)


@pytest.mark.parametrize("name", contestants_on("cpu"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(benchmark: "BenchmarkFixture", shape: tuple[int, int, int], name: str) -> None:
    """Under pytest-benchmark, by its own choice of rounds."""
    benchmark.group = str(shape)
    step = step_of(shape, name)
    step()
    benchmark(step)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_step(benchmark: "BenchmarkFixture", name: str) -> None:
    """Under pytest-benchmark, a few rounds."""
    benchmark.group = f"linear {LINEAR_SHAPE}"
    benchmark.pedantic(linear_step_of(name), rounds=5, warmup_rounds=1)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--time-only", action="store_true")
    settings = parser.parse_args()
    device, weigh = settings.device, settings.device == "cpu" and not settings.time_only
    torch.set_num_threads(settings.threads)
    names = list(contestants_on(device))
    print(f"PyTorch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32")
    print("speed-up over the usual loop (peak memory over that of the usual loop)")
    print(f"{'exits, rows, classes':>20} {'loop, ms':>9} " + "".join(f"{n:>17}" for n in names[1:]))
    for shape in SHAPES:
        num_elements = shape[0] * shape[1] * shape[2]
        num_steps = max(1, min(300, 2**25 // num_elements))  # in one turn: the heap settles first
        steps = {name: (step_of(shape, name, device), num_steps) for name in names}
        seconds = seconds_by_turns(steps, settings.rounds)
        ratios = median_ratios(seconds, names[0])
        weighed = names if weigh and num_steps == 1 else []  # the others hide in what a heap keeps
        memory = {name: peak_memory(peak_of_step, shape, name) for name in weighed}
        cells = []
        for name in names[1:]:
            share = f" ({memory[name] / memory[names[0]]:.2f})" if memory else ""
            cells.append(f"{1 / ratios[name]:.2f}{share}")
        first = sorted(seconds[names[0]])[settings.rounds // 2] * 1e3
        print(
            f"{shape!s:>20} {first:>9.2f} " + "".join(f"{cell:>17}" for cell in cells), flush=True
        )
    print(BYTES)
    print(f"\nexits that share a head, {LINEAR_SHAPE}: time and peak memory over the materialised")
    seconds = seconds_by_turns(
        {name: (linear_step_of(name, device), 1) for name in LINEAR}, max(3, settings.rounds // 2)
    )
    ratios = median_ratios(seconds, "materialised")
    for name in LINEAR:
        share = ""
        if weigh:
            mine, other = (peak_memory(peak_of_step, None, n) for n in (name, "materialised"))
            share = f"{mine / other:.2f}  ({mine / 1024:.0f} MiB)"
        print(f"{name:>24} {ratios[name]:>6.2f} {share}", flush=True)


if __name__ == "__main__":
    main()
