"""Time of an answer against its mean cost, when early exit really stops computing.

MSDNet with five exits on Fashion-MNIST: each budget's thresholds come from a held-out split and are
saved with the net; test images are answered in batches of 1, 32 and 256, beside the whole net on
the same batches, all on one thread. Time is the wall clock's: run it on a machine that does nothing
else. Writes `results/early_exit_time.csv` and `.png`. The net is trained for a few
hundred steps, enough for exits that are sure of some images and not of others, and kept in --net.

    python benchmarks/early_exit_time.py
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD

from measure import median_ratios, seconds_by_turns
from reweight import choose_exits, exit_costs, exit_cross_entropy, exit_shares, find_thresholds

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from data import Data, load_data
from early_exit import Answers, answer
from msdnet import MSDNet
from staged import StagedNet
from train import batches_of, evaluate, training_batches

RESULTS = Path(__file__).with_name("results")
POWERS = (0.05, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.95)
BATCH_SIZES = {1: 32, 32: 128, 256: 256}  # and how many images are answered in a round
WHOLE = "whole net"


def train_and_calibrate(data: Data, num_steps: int) -> dict[str, Any]:
    """Parameters of the net, and the thresholds of each budget."""
    torch.manual_seed(0)
    net = MSDNet(data.num_classes, in_channels=1)
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    batches = training_batches(data.train, data, 64)
    for _, ((images, _), target) in zip(range(num_steps), batches, strict=False):
        optimizer.zero_grad()
        exit_cross_entropy(net(images), target).losses.mean(0).sum().backward()
        optimizer.step()
    confidence = evaluate(net, data.calibration).confidence
    assert confidence is not None
    shares = {power: exit_shares(confidence.shape[1], power) for power in POWERS}
    thresholds = {power: find_thresholds(confidence, each) for power, each in shares.items()}
    return {"model": net.state_dict(), "thresholds": thresholds}


@torch.no_grad()
def whole(net: StagedNet, batches: list[Tensor]) -> list[Tensor]:
    """Logits of all exits, each [N, C]."""
    return [torch.cat(parts) for parts in zip(*(net(images) for images in batches), strict=True)]


def early(net: StagedNet, batches: list[Tensor], thresholds: Tensor) -> Answers:
    parts = [answer(net, images, thresholds) for images in batches]
    return Answers(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def simulate(logits: list[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and exits that the thresholds choose among the logits of the whole net."""
    logits = [exit_logits.double() for exit_logits in logits]
    classes = torch.stack([exit_logits.argmax(1) for exit_logits in logits], 1)
    confidence = exit_cross_entropy(logits, classes[:, 0]).confidence
    assert confidence is not None
    exits = choose_exits(confidence, thresholds)
    return classes.gather(1, exits[:, None])[:, 0], exits


def measure(
    net: StagedNet,
    thresholds: dict[float, Tensor],
    images: Tensor,
    target: Tensor,
    batch_size: int,
    num_rounds: int,
) -> list[dict[str, object]]:
    """A row for each budget, and one for the whole net."""
    costs = torch.tensor(exit_costs(net, images[:1], in_order=True), dtype=torch.float64)
    batches = list(images.split(batch_size))
    contestants: dict[float | str, Any] = {WHOLE: (lambda: whole(net, batches), 1)}
    for power, asked in thresholds.items():
        contestants[power] = (lambda asked=asked: early(net, batches, asked), 1)
    seconds = seconds_by_turns(contestants, num_rounds)
    ratios = median_ratios(seconds, WHOLE)
    logits = whole(net, batches)
    rows = []
    for name in contestants:
        if isinstance(name, float):
            classes, _, exits = early(net, batches, thresholds[name])
            expected_classes, expected_exits = simulate(logits, thresholds[name])
            differing = int(((classes != expected_classes) | (exits != expected_exits)).sum())
        else:
            classes, exits = logits[-1].argmax(1), torch.full_like(target, len(costs) - 1)
            differing = 0
        rows.append(
            {
                "batch_size": batch_size,
                "power": name if isinstance(name, float) else "",
                "images": len(images),
                "mean_cost": f"{costs[exits].mean().item():.0f}",
                "milliseconds_per_image": (
                    f"{1e3 * statistics.median(seconds[name]) / len(images):.3f}"
                ),
                "cost_over_whole": f"{(costs[exits].mean() / costs[-1]).item():.3f}",
                "time_over_whole": f"{ratios[name]:.3f}",
                "accuracy": f"{(classes == target).double().mean().item():.4f}",
                "answers_unlike_the_simulation": differing,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="of Fashion-MNIST")
    parser.add_argument("--net", type=Path, default=Path("runs", "early_exit", "msdnet.pt"))
    parser.add_argument("--steps", type=int, default=300, help="of training, if it is not there")
    parser.add_argument("--rounds", type=int, default=3, help="0: train the net and no more")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("fashion-mnist", chosen.data_dir, seed=0)
    if not chosen.net.exists():
        chosen.net.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train_and_calibrate(data, chosen.steps), chosen.net)
    if not chosen.rounds:
        return
    saved = torch.load(chosen.net, weights_only=True)
    net = MSDNet(data.num_classes, in_channels=1)
    net.load_state_dict(saved["model"])
    net.eval()
    rows = []
    for batch_size, num_images in BATCH_SIZES.items():
        images, target = next(iter(batches_of(data.test, num_images)))
        mine = measure(net, saved["thresholds"], images, target, batch_size, chosen.rounds)
        print(*mine, sep="\n", flush=True)
        rows += mine
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
        whole, *mine = (row for row in rows if row["batch_size"] == batch_size)
        milliseconds = float(str(whole["milliseconds_per_image"]))
        axes.plot(
            [float(str(row["cost_over_whole"])) for row in mine],
            [float(str(row["time_over_whole"])) for row in mine],
            "o-",
            color=color,
            label=f"batches of {batch_size}; whole net {milliseconds:.1f} ms an image",
        )
    axes.plot([1], [1], "s", color="black", label="whole net")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("mean multiply-adds of an answer, over those of the whole net")
    axes.set_ylabel("time of an answer, over that of the whole net")
    axes.set_title("MSDNet, five exits, images of 28×28, one CPU core")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
