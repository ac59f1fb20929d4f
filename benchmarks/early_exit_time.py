"""Time of an answer against its mean cost, when early exit really stops computing.

MSDNet with five exits on Fashion-MNIST: each budget's thresholds come from a held-out split, and
test images are answered in batches of 1, 32 and 256, beside the whole net on the same batches.
Writes `results/early_exit_time.csv` and `.png`. The net is trained for a few hundred steps, enough
for exits that are sure of some images and not of others, and kept in --net.

    python benchmarks/early_exit_time.py
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD

from measure import median_ratios, seconds_by_turns
from reweight import exit_costs, exit_cross_entropy, exit_shares, find_thresholds

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from data import Data, load_data
from early_exit import answer
from msdnet import MSDNet
from train import batches_of, evaluate, training_batches

RESULTS = Path(__file__).with_name("results")
POWERS = (0.05, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.95)
BATCH_SIZES = {1: 128, 32: 512, 256: 1024}  # and how many images are answered in a round
WHOLE = "whole net"


def trained(data: Data, path: Path, num_steps: int) -> MSDNet:
    torch.manual_seed(0)
    net = MSDNet(data.num_classes, in_channels=1)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for number, (images, target) in enumerate(training_batches(data, 64)):
        if number == num_steps:
            break
        optimizer.zero_grad()
        exit_cross_entropy(net(images), target).losses.mean(0).sum().backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


@torch.no_grad()
def whole(net: MSDNet, batches: list[Tensor]) -> None:
    for images in batches:
        net(images)


def early(net: MSDNet, batches: list[Tensor], thresholds: Tensor) -> None:
    for images in batches:
        answer(net, images, thresholds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="of Fashion-MNIST")
    parser.add_argument("--net", type=Path, default=Path("runs", "early_exit", "msdnet.pt"))
    parser.add_argument("--steps", type=int, default=300, help="of training, if it is not there")
    parser.add_argument("--rounds", type=int, default=5, help="0: train the net and no more")
    chosen = parser.parse_args()
    data = load_data("fashion-mnist", chosen.data_dir, seed=0)
    net = trained(data, chosen.net, chosen.steps)
    if not chosen.rounds:
        return
    costs = torch.tensor(exit_costs(net, data.test[0][0][None], in_order=True), dtype=torch.float64)
    held_out = next(iter(batches_of(data.calibration, 2000)))
    confidence = evaluate(net, torch.utils.data.TensorDataset(*held_out)).confidence
    thresholds = {p: find_thresholds(confidence, exit_shares(len(costs), p)) for p in POWERS}
    rows = []
    for batch_size, num_images in BATCH_SIZES.items():
        images, target = next(iter(batches_of(data.test, num_images)))
        batches = list(images.split(batch_size))
        contestants = {WHOLE: (lambda batches=batches: whole(net, batches), 1)}
        for power in POWERS:
            contestants[power] = (
                lambda batches=batches, t=thresholds[power]: early(net, batches, t),
                1,
            )
        seconds = seconds_by_turns(contestants, chosen.rounds)
        ratios = median_ratios(seconds, WHOLE)
        for name in contestants:
            exits = torch.full_like(target, len(costs) - 1)
            with torch.no_grad():
                classes = None if name != WHOLE else net(images)[-1].argmax(1)
            if name != WHOLE:
                classes, _, exits = answer(net, images, thresholds[name])
            rows.append(
                {
                    "batch_size": batch_size,
                    "power": "" if name == WHOLE else name,
                    "mean_cost": f"{costs[exits].mean().item():.0f}",
                    "milliseconds_per_image": (
                        f"{1e3 * statistics.median(seconds[name]) / num_images:.3f}"
                    ),
                    "time_over_whole": f"{ratios[name]:.3f}",
                    "cost_over_whole": f"{(costs[exits].mean() / costs[-1]).item():.3f}",
                    "accuracy": f"{(classes == target).double().mean().item():.4f}",
                }
            )
            print(rows[-1], flush=True)
    with (RESULTS / "early_exit_time.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, RESULTS / "early_exit_time.png")


def plot(rows: list[dict[str, object]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "--", color="#777777", linewidth=1, label="time as cost")
    colors = ("#fdba74", "#ea580c", "#7c2d12")
    for batch_size, color in zip(BATCH_SIZES, colors, strict=True):
        mine = [row for row in rows if row["batch_size"] == batch_size and row["power"] != ""]
        axes.plot(
            [float(str(row["cost_over_whole"])) for row in mine],
            [float(str(row["time_over_whole"])) for row in mine],
            "o-",
            color=color,
            label=f"batches of {batch_size}",
        )
    axes.plot([1], [1], "s", color="black", label="whole net")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("mean multiply-adds of an answer, over those of the whole net")
    axes.set_ylabel("time of an answer, over that of the whole net")
    axes.set_title("MSDNet, five exits, images of 28×28, two CPU cores")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
