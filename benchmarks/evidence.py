"""Train the arms of an experiment over seeds, on one core: one row of CSV for each run.

    python benchmarks/evidence.py --experiment noise-40 --seeds 0 1 2 --arms conventional sigmoid

Rows go to benchmarks/results/evidence/EXPERIMENT.csv and are only ever added; what the file holds
is not run again. Runs of one seed share the split, the first parameters and the order of the
batches. ``benchmarks/report.py`` makes tables and plots of the files.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from arms import ARMS, Arm, FreeWeights, GradNorm, RandomThresholds
from reweight import (
    ExitLosses,
    MetaReweightStep,
    anytime_accuracy,
    budgeted_curve,
    exit_costs,
    exit_cross_entropy,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from data import augment, load_data

RESULTS = Path(__file__).parent / "results" / "evidence"


@dataclass(frozen=True)
class Experiment:
    """What all arms of an experiment share.

    Args:
        data: name of the data set.
        num_exits: K; with 1 the net is the same with its last exit alone.
        epochs: of the conventional arm.
        train_size: samples to train on.
        label_noise: share of them with a wrong label.
        neighbours: wrong labels are all those of the next class, as real mistakes are of a kind.
        long_tail: size of the first class over the last.
        num_clean: held-out samples that serve as clean, or extra, meta data, all classes alike; at
            most half of those that are held out.
        meta: where meta batches come from, see :class:`arms.Arm`.
        batch_size: samples of each training step, and of each meta batch.
        lr: at the start; SGD with Nesterov momentum 0.9, weight decay 1e-4, cosine to 0.
        width: channels of the net's first layer.
        hidden: width of a hidden layer in each exit, for nets to memorise with; 0 for none.
    """

    data: str
    num_exits: int
    epochs: int
    train_size: int | None
    label_noise: float = 0.0
    neighbours: bool = False
    long_tail: float = 1.0
    num_clean: int = 1000
    meta: str = "halves"
    batch_size: int = 64
    lr: float = 0.05
    width: int = 16
    hidden: int = 0


EXPERIMENTS = {
    "digits-200": Experiment("digits", 5, 40, 200, batch_size=50, width=8),
    "cheaper": Experiment(
        "digits", 5, 20, None, label_noise=0.4, meta="extra", batch_size=64, width=8, hidden=256
    ),
    "fashion-narrow": Experiment("fashion-mnist", 5, 4, None, batch_size=256, lr=0.1, width=4),
    "fashion-5k": Experiment("fashion-mnist", 5, 40, 5000, batch_size=100, width=8),
    "fashion-1k": Experiment("fashion-mnist", 5, 40, 1000, batch_size=50, width=8),
    **{
        f"noise-{percent}{suffix}": Experiment(
            "fashion-mnist",
            num_exits,
            30,
            20_000,
            label_noise=percent / 100,
            meta="extra",
            batch_size=256,
            lr=0.1,
            width=8,
            hidden=256,
        )
        for percent in (20, 40)
        for num_exits, suffix in ((1, ""), (5, "-exits"))
    },
    **{
        f"{data}-{kind}{suffix}": Experiment(
            data,
            num_exits,
            *size,
            label_noise=share,
            neighbours=kind == "neighbours",
            meta="extra",
            batch_size=batch_size,
            lr=lr,
            width=8,
            hidden=256,
        )
        for data, size, batch_size, lr in (
            ("digits", (20, None), 64, 0.05),
            ("fashion-mnist", (10, 10_000), 128, 0.1),
        )
        for kind, share in (("clean", 0.0), ("symmetric", 0.4), ("neighbours", 0.4))
        for num_exits, suffix in ((1, ""), (5, "-exits"))
    },
    "fashion-2k-symmetric": Experiment(
        "fashion-mnist", 1, 30, 2000, label_noise=0.4, meta="extra", width=8, hidden=256
    ),
    **{
        f"long-tail{suffix}": Experiment(
            "fashion-mnist",
            5,
            6,
            10_000,
            label_noise=share,
            long_tail=100,
            num_clean=100,
            meta="extra",
            batch_size=100,
            width=8,
        )
        for share, suffix in ((0.0, ""), (0.2, "-noise-20"))
    },
}


class Net(nn.Module):
    """3×3 convolutions with BatchNorm, an exit after each of five; 28×28 is halved on entry.

    Without hidden layers in the exits the resolution is halved twice, with them once.

    Args:
        input_shape: (channels, height, width) of one image.
        num_exits: 5, or 1 for the last exit alone.
        width: channels of the first convolution; doubled halfway.
        hidden: width of a hidden layer in each exit; 0 for none.
        dropout: before each exit.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_exits: int,
        width: int,
        hidden: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, size = input_shape[0], input_shape[1]
        self.unshuffle = 2 if size > 8 else 1
        channels, size = channels * self.unshuffle**2, size // self.unshuffle
        blocks, exits = [], []
        for k in range(5):
            out = width if k < 2 else 2 * width
            stride = 2 if k == 0 or (k == 2 and not hidden) else 1
            convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
            blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU()))
            channels, size = out, (size + stride - 1) // stride
            parts: list[nn.Module] = [nn.Flatten(), *([nn.Dropout(dropout)] if dropout else [])]
            if hidden:
                parts += [nn.Linear(size**2 * out, hidden), nn.ReLU()]
            exits.append(nn.Sequential(*parts, nn.Linear(hidden or size**2 * out, 10)))
        self.blocks = nn.ModuleList(blocks)
        self.exits = nn.ModuleList(exits[-num_exits:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] → K logits [B, 10]."""
        x = F.pixel_unshuffle(x, self.unshuffle)  # every pixel kept, as channels
        logits = []
        for k, block in enumerate(self.blocks, len(self.exits) - len(self.blocks)):
            x = block(x)
            if k >= 0:
                logits.append(self.exits[k](x))
        return logits


@dataclass(frozen=True)
class Samples:
    """Images and labels, and whether each label is right."""

    images: Tensor
    labels: Tensor
    is_clean: Tensor

    def __getitem__(self, rows: Any) -> "Samples":
        return Samples(self.images[rows], self.labels[rows], self.is_clean[rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: "Samples") -> "Samples":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Samples(*(torch.cat(pair) for pair in pairs))

    def batch(self, random_augment: bool) -> tuple[Tensor, Tensor]:
        """As a step takes it."""
        return (augment(self.images) if random_augment else self.images), self.labels


@lru_cache(maxsize=1)
def splits(experiment: Experiment, seed: int) -> dict[str, Samples]:
    """Training, extra held-out (clean), calibration and test samples."""
    data = load_data(
        experiment.data,
        seed=seed,
        label_noise=experiment.label_noise,
        neighbours=experiment.neighbours,
        long_tail=experiment.long_tail,
        train_size=experiment.train_size,
    )
    parts = {}
    for name in ("train", "calibration", "test"):
        images, labels = getattr(data, name).tensors
        right = labels == data.train_clean_labels if name == "train" else labels == labels
        parts[name] = Samples(images, labels, right)
    num_extra = min(experiment.num_clean, len(parts["calibration"]) // 2)
    parts["extra"] = parts["calibration"][:num_extra]
    parts["calibration"] = parts["calibration"][num_extra:]
    return parts


class Run:
    """One training: an arm of an experiment with one seed."""

    def __init__(self, experiment: Experiment, arm: Arm, seed: int) -> None:
        self.experiment, self.arm = experiment, arm
        parts = splits(experiment, seed)
        self.calibration, self.test = parts["calibration"], parts["test"]
        self.meta_from = (arm.meta or experiment.meta) if arm.learned else "halves"
        clean, train = parts["extra"], parts["train"]
        self.train = {"train": train, "clean": clean, "both": train + clean}[arm.train_on]
        self.pool = clean
        if self.meta_from == "of the training set":
            num_held = len(train) // 10
            self.pool, self.train = train[:num_held], train[num_held:]
        elif self.meta_from == "test":
            self.pool = parts["test"]
        counts = self.train.labels.bincount()
        self.class_weights = len(self.train) / (len(counts) * counts)

        torch.manual_seed(seed)
        self.model = Net(
            tuple(train.images.shape[1:]),
            experiment.num_exits,
            experiment.width,
            experiment.hidden,
            arm.dropout,
        )
        self.costs = exit_costs(self.model, train.images[:1], in_order=True)
        self.optimizer = SGD(
            self.model.parameters(), experiment.lr, 0.9, weight_decay=1e-4, nesterov=True
        )
        self.epochs = experiment.epochs * arm.epochs
        self.scheduler = CosineAnnealingLR(self.optimizer, self.epochs)
        self.weighting = arm.weighting(experiment.num_exits, experiment.batch_size)
        if isinstance(self.weighting, GradNorm):
            self.weighting.shared = self.model.blocks[0][0].weight
        if isinstance(self.weighting, RandomThresholds):
            self.weighting.num_steps = self.epochs * self.epoch_steps
        if arm.learned:
            parameters, optimizer = self.weighting.parameters(), None
            if arm.lr is not None:
                optimizer = Adam(parameters, arm.lr, weight_decay=1e-4)
            elif isinstance(self.weighting, FreeWeights):
                optimizer = SGD(parameters, 1.0)
            self.step = MetaReweightStep(
                self.model,
                self.optimizer,
                self.weighting,
                reweighter_optimizer=optimizer,
                **arm.options,
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds = 0.0
        self.moved: list[float] = []  # mean |w − 1| of each epoch
        self.agreement: list[float] = []  # of each epoch

    @property
    def epoch_steps(self) -> int:
        """Of each epoch, an even number; of a smaller training set as many as of the whole."""
        num_samples = max(self.experiment.train_size or 0, len(self.train))
        return 2 * (num_samples // (2 * self.experiment.batch_size))

    def pairs(self) -> Iterator[tuple[Samples, Samples]]:
        """One epoch of (train, meta); the order of the training samples depends on the seed alone.

        Two training batches at a time, as the halves of one batch whose roles are swapped. What
        conventional training does not look at, it is given all the same. A training set smaller
        than that of the experiment is gone through as often as it takes.
        """
        size, num_steps = self.experiment.batch_size, self.epoch_steps
        order = torch.cat(
            [
                torch.randperm(len(self.train), generator=self.generator)
                for _ in range(-(-num_steps * size // len(self.train)))
            ]
        )
        batches = order[: num_steps * size].view(num_steps, size)
        for index in range(num_steps):
            train = self.train[batches[index]]
            if self.meta_from in ("halves", "next"):
                yield train, self.train[batches[index ^ 1]]
            else:
                num_meta = round(size * self.arm.meta_share)
                yield train, self.pool[torch.randint(len(self.pool), (num_meta,))]

    def train_epoch(self, epoch: int) -> tuple[ExitLosses, Tensor, Tensor]:
        """Losses, weights and cleanness of the samples as they were met."""
        seen: list[tuple[Tensor, ...]] = []
        warm = epoch >= self.arm.warm_up * self.epochs
        self.model.train()
        for train, meta in self.pairs():
            batch = train.batch(self.arm.augment)
            self.optimizer.zero_grad()
            if self.arm.learned and warm:
                judge = None if self.meta_from == "next" else meta.batch(self.arm.augment)
                result = self.step.backward(batch, judge)
                exit_losses, weights = result.losses, result.weights
            else:
                exit_losses = exit_cross_entropy(self.model(batch[0]), batch[1])
                with torch.no_grad():
                    weights = (
                        self.weighting(exit_losses) if warm else torch.ones_like(exit_losses.losses)
                    )
                    if self.arm.class_balanced:
                        weights = weights * self.class_weights[batch[1]].unsqueeze(1)
                (weights * exit_losses.losses).mean(0).sum().backward()
            self.optimizer.step()
            found = (exit_losses.losses.detach(), weights.detach(), train.is_clean, train.labels)
            seen.append(found)
        self.scheduler.step()
        losses, weights, is_clean, labels = map(torch.cat, zip(*seen, strict=True))
        return ExitLosses(losses, labels=labels), weights, is_clean

    def __call__(self, progress: Progress, title: str) -> dict[str, Any]:
        """Train and evaluate; the columns of the row."""
        best, best_epoch, best_state = -1.0, 0, {}
        check = self.calibration[:2000]
        for epoch in progress.track(range(self.epochs), description=title):
            start = time.process_time()
            losses, weights, is_clean = self.train_epoch(epoch)
            self.seconds += time.process_time() - start
            self.moved.append((weights - 1).abs().mean().item())
            rare = self.class_weights > self.class_weights.median()
            wanted = rare[losses.labels] if bool(is_clean.all()) else is_clean
            self.agreement.append(agreement(weights, wanted))
            accuracy = anytime_accuracy(self.evaluate(check)).mean().item()
            if accuracy > best:
                best, best_epoch = accuracy, epoch + 1
                best_state = {k: v.clone() for k, v in self.model.state_dict().items()}
        row = self.accuracies()
        weighed = is_clean if bool(is_clean.any()) else ~is_clean
        row |= {
            "epochs": self.epochs,
            "seconds": self.seconds,
            "clean weight": weights[weighed].mean().item(),
            "wrong weight": weights[~is_clean].mean().item(),
            "moved": self.moved,
            **weights_by_loss(losses.losses, weights),
        }
        self.model.load_state_dict(best_state)
        at_best = self.accuracies()
        kept = [name for name in at_best if name.startswith(("exit", "budgeted", "area"))]
        row |= {"best epoch": best_epoch, **{f"best {name}": at_best[name] for name in kept}}
        return row | {"agreement": self.agreement}

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> ExitLosses:
        """Every exit on every sample; in float64, so that confident samples do not tie."""
        self.model.eval()
        parts = [
            exit_cross_entropy([logits.double() for logits in self.model(images)], target)
            for images, target in zip(
                samples.images.split(500), samples.labels.split(500), strict=True
            )
        ]
        return ExitLosses.cat(parts)

    def accuracies(self) -> dict[str, Any]:
        """On the test set, in percent; thresholds from the calibration set."""
        test = self.evaluate(self.test)
        curve = budgeted_curve(self.evaluate(self.calibration), test, self.costs)
        accuracy = [100 * point.accuracy for point in curve]
        cost = [point.cost for point in curve]
        exits = {
            f"exit {k + 1}": 100 * value for k, value in enumerate(anytime_accuracy(test).tolist())
        }
        return exits | {
            "budgeted": sum(accuracy) / len(accuracy),
            "area": area(cost, accuracy, self.costs),
            "curve accuracy": accuracy,
            "curve cost": cost,
        }


def area(cost: list[float], accuracy: list[float], costs: list[int]) -> float:
    """Mean accuracy over costs from 5 % to 70 % of the way from the first exit's to the last's."""
    if len(costs) == 1:
        return accuracy[0]
    grid = costs[0] + np.linspace(0.05, 0.7, 100) * (costs[-1] - costs[0])
    order = np.argsort(cost)
    return float(np.interp(grid, np.array(cost)[order], np.array(accuracy)[order]).mean())


def agreement(weights: Tensor, wanted: Tensor) -> float:
    """How often a sample that is wanted has a larger mean weight than one that is not, [B, K], [B].

    The area under the ROC curve: 1 where weights tell them apart, 1/2 where they tell nothing.
    """
    groups = [weights[rows].mean(1).numpy() for rows in (wanted, ~wanted)]
    pairs = len(groups[0]) * len(groups[1])
    return float(mannwhitneyu(*groups).statistic / pairs) if pairs else np.nan


def weights_by_loss(losses: Tensor, weights: Tensor) -> dict[str, list[float]]:
    """Mean loss and weight of each tenth of the samples by loss, exit after exit."""
    found: dict[str, list[float]] = {"tenths loss": [], "tenths weight": []}
    for k in range(losses.shape[1]):
        for rows in losses[:, k].argsort().tensor_split(10):
            found["tenths loss"].append(losses[rows, k].mean().item())
            found["tenths weight"].append(weights[rows, k].mean().item())
    return found


def run(experiment: Experiment, name: str, seed: int, progress: Progress) -> dict[str, Any]:
    """The row of one run."""
    arm = ARMS[name]
    training = Run(experiment, arm, seed)
    if arm.frozen_from is not None:
        learned_on = EXPERIMENTS[arm.frozen_on] if arm.frozen_on else experiment
        teacher = Run(learned_on, ARMS[arm.frozen_from], seed)
        teacher(progress, f"{arm.frozen_from}, for {name}, seed {seed}")
        training = Run(experiment, arm, seed)
        training.weighting = teacher.weighting
    return {"arm": name, "seed": seed, **training(progress, f"{name}, seed {seed}")}


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, in one write, so that two processes may add to one file."""
    columns = {name: _cell(value) for name, value in row.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(columns)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["conventional", "published"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = settings.results / f"{settings.experiment}.csv"
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for seed in settings.seeds:
            for name in settings.arms:
                if any((row["arm"], row["seed"]) == (name, str(seed)) for row in read(path)):
                    continue
                row = run(EXPERIMENTS[settings.experiment], name, seed, progress)
                append(path, row)
                console.print(
                    f"{settings.experiment}, {name}, seed {seed}: budgeted {row['budgeted']:.2f}, "
                    f"at its best {row['best budgeted']:.2f} (epoch {row['best epoch']} of "
                    f"{row['epochs']}), {row['seconds']:.0f} s"
                )


if __name__ == "__main__":
    main()
