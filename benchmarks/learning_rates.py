"""Whether what is learned depends on the scale of the model's learning rate.

    python benchmarks/learning_rates.py

Digits with 40 % wrong labels and 200 clean ones that judge. A net that has learned from other
digits goes on with SGD at 0.1 or, as transformers are fine-tuned, with AdamW at 5e-5. The
hypergradient goes with that rate. One row of CSV for each optimizer, reweighter's optimizer and
seed: the mean weight of right and of wrong labels in the last epoch, and the accuracy at its end.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from data import load_data
from reweight import MetaReweightStep, SampleReweighter

RESULTS = Path(__file__).parent / "results" / "learning_rates.csv"
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD 0.1": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW 5e-5": lambda model: AdamW(model.parameters(), lr=5e-5),
}
LEARNERS: dict[str, Callable[[nn.Module], Optimizer | None]] = {
    "default": lambda reweighter: None,
    "coupled decay": lambda reweighter: Adam(reweighter.parameters(), lr=1e-3, weight_decay=1e-4),
}


def run(optimizer_name: str, learner: str, seed: int, epochs: int) -> dict[str, object]:
    """One training."""
    data = load_data("digits", seed=seed, label_noise=0.4)
    (inputs, given), right = data.train.tensors, data.train_clean_labels
    clean = tuple(each[:200] for each in data.calibration.tensors)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    first = SGD(model.parameters(), lr=0.1)
    for _ in range(30):
        first.zero_grad()
        cross_entropy(model(inputs[:300]), right[:300]).backward()
        first.step()
    inputs, given, right = inputs[300:], given[300:], right[300:]
    optimizer = OPTIMIZERS[optimizer_name](model)
    reweighter = SampleReweighter(num_exits=1)
    step = MetaReweightStep(
        model, optimizer, reweighter, reweighter_optimizer=LEARNERS[learner](reweighter)
    )
    wrong, weights = given != right, torch.empty(len(given))
    for _ in range(epochs):
        for rows in torch.randperm(len(given)).split(50):
            weights[rows] = step((inputs[rows], given[rows]), clean).weights.squeeze(1)
    test_inputs, test_target = data.test.tensors
    with torch.no_grad():
        accuracy = (model(test_inputs).argmax(1) == test_target).float().mean()
    return {
        "optimizer": optimizer_name,
        "reweighter_optimizer": learner,
        "seed": seed,
        "weight_of_right_labels": f"{weights[~wrong].mean():.3f}",
        "weight_of_wrong_labels": f"{weights[wrong].mean():.3f}",
        "accuracy": f"{accuracy:.4f}",
    }


def main() -> None:
    """All of them, to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    cells = [
        (optimizer, learner, seed)
        for optimizer in OPTIMIZERS
        for learner in LEARNERS
        for seed in range(arguments.seeds)
    ]
    rows = [run(*cell, arguments.epochs) for cell in track(cells, "training")]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{value!s:>16}" for value in row.values()))


if __name__ == "__main__":
    main()
