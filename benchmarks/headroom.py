"""What any fixed weighting by the losses can gain: the best of many, by the outcome of training.

    python benchmarks/headroom.py --experiment fashion-narrow

A reweighter that looks one step ahead need not find what is best in the end. Here nothing looks
ahead: fixed weightings are drawn at random, each trains a net to the end, and those with the best
test accuracy within a budget go on to the next round. What is left in the end is held against
conventional training with seeds that had no part in the choice. One row of CSV for each training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from arms import STRENGTH, Arm
from evidence import EXPERIMENTS, Run, append, read
from report import paired
from reweight import ExitLosses

RESULTS = Path(__file__).parent / "results" / "headroom.csv"
CONVENTIONAL = 0  # the candidate whose weights are 1


class FixedWeighting(nn.Module):
    """w = 1 + 0.8·(tanh(r) − mean over the exits), r = A·z + b, z the batch's own log losses.

    Log losses are standardised over the batch at each exit. A and b are drawn once, by the number
    of the candidate: exit against exit, easy against hard, and any mixture of them.
    """

    def __init__(self, num_exits: int, candidate: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(candidate)
        self.slopes = torch.randn(num_exits, num_exits, generator=generator) / num_exits**0.5
        self.offsets = torch.randn(num_exits, generator=generator) / 2

    def forward(self, exit_losses: ExitLosses) -> Tensor:
        """Weights [B, K]."""
        logarithms = (exit_losses.losses + 1e-4).log()
        std, mean = torch.std_mean(logarithms, 0)
        bounded = ((logarithms - mean) / (std + 1e-6) @ self.slopes.T + self.offsets).tanh()
        return 1 + STRENGTH * (bounded - bounded.mean(1, keepdim=True))


def budgeted(experiment: str, candidate: int, seed: int, progress: Progress) -> float:
    """The test accuracy within a budget of one training, from the file if it is there."""
    for row in read(RESULTS):
        if (row["experiment"], row["candidate"], row["seed"]) == (
            experiment,
            str(candidate),
            str(seed),
        ):
            return float(row["budgeted"])
    arm = Arm() if candidate == CONVENTIONAL else Arm(lambda k, _: FixedWeighting(k, candidate))
    title = f"{experiment}, candidate {candidate}, seed {seed}"
    row = Run(EXPERIMENTS[experiment], arm, seed)(progress, title)
    columns = ("budgeted", "area", "exit 1", "exit 5", "moved")
    kept = {name: row[name][-1] if name == "moved" else row[name] for name in columns}
    append(RESULTS, {"experiment": experiment, "candidate": candidate, "seed": seed} | kept)
    return float(row["budgeted"])


def search(experiment: str, rounds: Sequence[Sequence[int]], progress: Progress) -> None:
    """Halve the field round by round, then judge the best with fresh seeds."""
    field, scores, seed = list(range(1, rounds[0][0] + 1)), dict[int, list[float]](), 0
    for num_kept, num_seeds in rounds:
        field = sorted(field, key=lambda candidate: -float(np.mean(scores.get(candidate, 0))))
        field = field[:num_kept]
        fresh = range(seed, seed + num_seeds)
        seed += num_seeds
        base = [budgeted(experiment, CONVENTIONAL, each, progress) for each in fresh]
        for candidate in field:
            found = [budgeted(experiment, candidate, each, progress) for each in fresh]
            scores[candidate] = scores.get(candidate, []) + found
            mean, reach = paired(found, base)
            progress.console.print(
                f"{experiment}, candidate {candidate}, seeds {fresh.start} to {seed - 1}: "
                f"{mean:+.2f} ± {reach:.2f} to conventional training",
                highlight=False,
            )


def main() -> None:
    """Search one experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--candidates", type=int, default=48)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    rounds = [(settings.candidates, 1), (settings.candidates // 4, 2), (3, 5)]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        search(settings.experiment, rounds, progress)


if __name__ == "__main__":
    main()
