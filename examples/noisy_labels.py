"""Meta-Weight-Net in thirty lines: digits of which 40 % are labelled wrongly, and 100 clean ones.

    pip install -e ".[examples]"
    python examples/noisy_labels.py    # five seeds in some minutes; draws noisy_labels.png

The plain net and the one whose weights are learned begin alike. The plain one trains on the clean
samples too; for the other they are the judge.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from reweight import MetaReweightStep, SampleReweighter
from reweight.plots import COLORS, plot_weights

NUM_CLEAN, NUM_TEST, BATCH = 100, 500, 50


def load(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, right labels and given ones, in an order drawn anew; the first are clean."""
    torch.manual_seed(seed)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    images, labels = images[order].float() / 16, labels[order]
    wrong = torch.rand(len(labels)) < 0.4
    wrong[:NUM_CLEAN] = False
    others = (labels + torch.randint(1, 10, labels.shape)) % 10
    return images, labels, torch.where(wrong, others, labels)


def train(seed: int, epochs: int, learned: bool) -> tuple[float, Tensor, Tensor, Tensor]:
    """Test accuracy at the end; loss, weight and wrongness of each sample of the last epoch."""
    images, labels, given = load(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=1))
    clean = images[:NUM_CLEAN], labels[:NUM_CLEAN]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(epochs):
        order = torch.randperm(len(labels) - NUM_TEST)
        seen.clear()
        # What judges is not trained on: its losses would be small whatever the weights are.
        for rows in (order[order >= NUM_CLEAN] if learned else order).split(BATCH):
            optimizer.zero_grad()
            if learned:
                result = step.backward((images[rows], given[rows]), clean)
                seen.append((result.losses.losses, result.weights, given[rows] != labels[rows]))
            else:
                cross_entropy(model(images[rows]), given[rows]).backward()
            optimizer.step()
        scheduler.step()
    right = model(images[-NUM_TEST:]).argmax(1) == labels[-NUM_TEST:]
    accuracy = 100 * right.double().mean().item()
    losses, weights, wrong = (
        map(torch.cat, zip(*seen, strict=True)) if learned else [torch.empty(0)] * 3
    )
    return accuracy, losses, weights, wrong


def plot(losses: Tensor, weights: Tensor, wrong: Tensor, title: str, path: Path) -> None:
    """The weight of each loss, and where the losses of right and of wrong labels lie."""
    figure = plot_weights(losses, weights, title=title)
    figure.set_size_inches(6, 4)
    axes = figure.axes[0]
    axes.set_title("")
    spread = axes.twinx()
    edges = torch.logspace(-6, 2, 60).tolist()
    for name, chosen, color in (("right", ~wrong, COLORS[2]), ("wrong", wrong, COLORS[0])):
        some = losses[chosen, 0].clamp(min=1e-6)
        spread.hist(some, bins=edges, alpha=0.35, color=color, label=f"{name} labels")
    spread.set_ylabel("samples")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Train both on every seed, say how they did, and draw the weights of the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("noisy_labels.png"))
    settings = parser.parse_args(arguments)
    gains = []
    for seed in track(range(settings.seeds), description="seeds"):
        plain, *_ = train(seed, settings.epochs, learned=False)
        ours, losses, weights, wrong = train(seed, settings.epochs, learned=True)
        gains.append(ours - plain)
        print(f"seed {seed}: plain {plain:.1f} %, learned weights {ours:.1f} %")
    print(f"gain {mean(gains):+.1f} points, from {min(gains):+.1f} to {max(gains):+.1f}")
    title = "Digits, 40 % wrong labels: the last epoch"
    plot(losses, weights, wrong, title, settings.out)
    print(f"written to {settings.out}")


if __name__ == "__main__":
    main()
