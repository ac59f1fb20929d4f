"""What a reweighted step costs, in plain steps of the same net, optimizer and batch.

A plain step is zero_grad, forward, backward and optimizer.step on the train batch. Time: the
contestants take turns in one process, and the median over the rounds of each one's ratio to the
plain step of the same round is printed, so that drift of the machine cancels. Memory: each
contestant in a process of its own, peak resident set above what it was before the first step.

    python benchmarks/step_cost.py            # all nets; about ten minutes on two cores
    python benchmarks/step_cost.py --nets conv --rounds 5
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from reweight import MetaReweightStep, SampleReweighter, exit_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from msdnet import MSDNet
from small import MultiExitConvNet

Batch = tuple[Tensor, Tensor]


class ViT(nn.Module):
    """A vision transformer on patches of 4×4, with an exit after every second of 8 layers."""

    def __init__(self, width: int = 128, num_layers: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(64, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.exits = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
            for _ in range(num_layers // 2)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, 32, 32] → K logits [B, C]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 2:
                logits.append(self.exits[i // 2](x.mean(1)))
        return logits


NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "conv": (lambda: MultiExitConvNet((3, 32, 32), 10, 5, 32), 5, 128),
    "msdnet": (lambda: MSDNet(10), 5, 64),
    "vit": (ViT, 4, 64),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-4),
}
MODES: dict[str, dict[str, object]] = {
    "forward": {"estimator": "forward"},
    "forward, interval 10": {"estimator": "forward", "interval": 10},
    "finite differences": {"estimator": "finite_difference"},
    "unrolled": {"estimator": "unrolled"},
}


def plain_step(model: nn.Module, optimizer: Optimizer, train: Batch) -> None:
    """Conventional training of all exits."""
    optimizer.zero_grad()
    exit_cross_entropy(model(train[0]), train[1]).losses.mean(0).sum().backward()
    optimizer.step()


def contestant(net: str, optimizer_name: str, mode: str) -> tuple[Callable[[], object], int]:
    """The step of a contestant, and how many of them to run for one measurement."""
    torch.manual_seed(0)
    build, num_exits, size = NETS[net]
    model = build()
    optimizer = OPTIMIZERS[optimizer_name](model)
    train, meta = ((torch.randn(size, 3, 32, 32), torch.randint(10, (size,))) for _ in range(2))
    if mode == "plain":
        return partial(plain_step, model, optimizer, train), 1
    step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits), **MODES[mode])  # type: ignore[arg-type]
    return partial(step, train, meta), step.interval


def times(net: str, optimizer_name: str, modes: list[str], num_rounds: int) -> dict[str, float]:
    """Median ratio of each mode's time to that of the plain step in the same round."""
    contestants = {mode: contestant(net, optimizer_name, mode) for mode in ["plain", *modes]}
    ratios: dict[str, list[float]] = {mode: [] for mode in modes}
    for round_number in range(num_rounds + 1):
        seconds = {}
        for mode, (step, num_steps) in contestants.items():
            start = time.perf_counter()
            for _ in range(num_steps):
                step()
            seconds[mode] = (time.perf_counter() - start) / num_steps
        if round_number:  # the first warms up
            for mode in modes:
                ratios[mode].append(seconds[mode] / seconds["plain"])
    return {mode: statistics.median(values) for mode, values in ratios.items()}


def peak_memory(net: str, optimizer_name: str, mode: str) -> int:
    """Peak resident set above the start of two steps, in kB; to be run in a process of its own."""
    step, _ = contestant(net, optimizer_name, mode)

    def high_water() -> int:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found.group(1))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = high_water()
    step()
    step()
    return high_water() - before


def main() -> None:
    """Print one table for each net and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; plain step = 1")
    print(f"{'net':>8} {'optimizer':>9} {'mode':>22} {'time':>6} {'peak memory':>12}")
    for net in settings.nets:
        for optimizer_name in settings.optimizers:
            ratios = times(net, optimizer_name, settings.modes, settings.rounds)
            memory = {}
            for mode in ["plain", *settings.modes]:
                with context.Pool(1) as pool:
                    memory[mode] = pool.apply(peak_memory, (net, optimizer_name, mode))
            for mode in settings.modes:
                share = memory[mode] / memory["plain"]
                print(
                    f"{net:>8} {optimizer_name:>9} {mode:>22} {ratios[mode]:>6.2f} {share:>12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
