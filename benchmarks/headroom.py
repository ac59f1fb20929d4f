"""What any fixed weighting by the losses can gain: the best of many, by the outcome of training.

    python benchmarks/headroom.py --experiment fashion-narrow

A reweighter that looks one step ahead need not find what is best in the end. Here nothing looks
ahead: fixed weightings are drawn at random, each trains a net to the end, and those with the best
test accuracy within a budget go on to the next round. What is left in the end is held against
conventional training with seeds that had no part in the choice. One row of CSV for each training.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from arms import STRENGTH, Arm
from evidence import EXPERIMENTS, Run, append, read
from report import CONVENTIONAL, HEADROOM, ROUNDS
from reweight import ExitLosses


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


def budgeted(path: Path, experiment: str, candidate: int, seed: int, progress: Progress) -> float:
    """The test accuracy within a budget of one training, from the file if it is there."""
    key = {"experiment": experiment, "candidate": str(candidate), "seed": str(seed)}
    for row in read(path):
        if row.items() >= key.items():
            return float(row["budgeted"])
    arm = Arm() if candidate == CONVENTIONAL else Arm(lambda k, _: FixedWeighting(k, candidate))
    setting = EXPERIMENTS[experiment]
    row = Run(setting, arm, seed)(progress, f"candidate {candidate}, seed {seed}")
    columns = ("budgeted", "area", "exit 1", f"exit {setting.num_exits}")
    append(path, key | {name: row[name] for name in columns} | {"moved": row["moved"][-1]})
    return float(row["budgeted"])


def search(path: Path, experiment: str, num_candidates: int, progress: Progress) -> None:
    """Keep the best quarter, then the best three, then judge those with fresh seeds."""
    field = list(range(1, num_candidates + 1))
    scores: dict[int, list[float]] = {candidate: [] for candidate in field}
    for num_kept, seeds in zip((num_candidates, num_candidates // 4, 3), ROUNDS, strict=True):
        field = sorted(field, key=lambda candidate: -sum(scores[candidate]))[:num_kept]
        base = [budgeted(path, experiment, CONVENTIONAL, seed, progress) for seed in seeds]
        for candidate in field:
            found = [budgeted(path, experiment, candidate, seed, progress) for seed in seeds]
            scores[candidate] += found
            mean = sum(found) / len(found) - sum(base) / len(base)
            progress.console.print(
                f"{experiment}, candidate {candidate}, seeds {[*seeds]}: {mean:+.2f}",
                highlight=False,
            )


def main(arguments: list[str] | None = None) -> None:
    """Search one experiment; ``benchmarks/report.py`` makes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--candidates", type=int, default=48)
    parser.add_argument("--results", type=Path, default=HEADROOM)
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        search(settings.results, settings.experiment, settings.candidates, progress)


if __name__ == "__main__":
    main()
