"""How the cost of a step in exact mode grows: with B, depth, K, the reweighter and the parameters.

The net is a row of 3×3 convolutions with BatchNorm on 16×16 pixels, all of one width, with exits of
a pooled linear layer spread evenly over it; for the parameters also a perceptron with four hidden
layers, which computes least with each parameter. One thing is varied at a time. Time is that of
``step_cost.py``: plain steps and ours of all settings of a row take turns, SGD with momentum.

    python benchmarks/growth.py               # about 10 minutes on two cores
    python benchmarks/growth.py --rows exits  # prints that row only, and writes nothing

Prints a table; writes ``results/growth.csv`` and ``results/growth.png``.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam

from contestants import CONTESTANTS
from measure import seconds_by_turns
from nets import Net, images
from phases import UPDATE, phase_seconds
from reweight import SampleReweighter
from small import MultiExitMLP

RESULTS = Path(__file__).parent / "results"


class Row(nn.Module):
    """Convolutions in a row with K exits spread evenly, the last one at the end."""

    def __init__(self, depth: int, width: int, num_exits: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for i in range(depth)
        )
        self.exits = nn.ModuleDict(
            {str((k + 1) * depth // num_exits - 1): nn.Linear(width, 10) for k in range(num_exits)}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] → K logits [B, 10]."""
        logits = []
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if str(i) in self.exits:
                logits.append(self.exits[str(i)](x.mean((2, 3))))
        return logits


@dataclass(frozen=True)
class Setting:
    """One point of one row; the defaults are what the other rows have in common."""

    batch: int = 64
    depth: int = 16
    exits: int = 4
    hidden: int = 500
    width: int = 32
    perceptron: int = 0

    def net(self) -> Net:
        """What the step is of."""
        build: Callable[[], nn.Module] = partial(Row, self.depth, self.width, self.exits)
        if self.perceptron:
            build = partial(MultiExitMLP, (3, 16, 16), 10, self.exits, self.perceptron)
        return Net(build, self.exits, partial(images, self.batch, side=16))

    def num_parameters(self) -> int:
        """Of the model, not the reweighter."""
        return sum(p.numel() for p in self.net().build().parameters())


ROWS: dict[str, tuple[str, Sequence[int]]] = {
    "batch": ("samples B", (8, 16, 32, 64, 128, 256)),
    "depth": ("convolutions", (4, 8, 16, 32)),
    "exits": ("exits K", (2, 4, 8, 16)),
    "hidden": ("hidden units of the reweighter", (100, 500, 2500)),
    "width": ("parameters", (16, 32, 64, 128)),
    "perceptron": ("parameters", (64, 256, 1024, 2048)),
}


def measure(row: str, num_rounds: int) -> list[dict[str, Any]]:
    """One record for each value of the row."""
    settings = [replace(Setting(), **{row: value}) for value in ROWS[row][1]]
    steps = {}
    for setting in settings:
        net = setting.net()
        for name in ("plain", "ours, forward"):
            torch.manual_seed(0)
            model, g = net.build(), SampleReweighter(setting.exits, num_hidden=setting.hidden)
            optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
            g_optimizer = Adam(g.parameters(), lr=1e-4, weight_decay=1e-4)
            step = CONTESTANTS[name](model, optimizer, g, g_optimizer)
            # A round of at least some ten milliseconds, or the clock of the machine is what shows.
            num_steps = 10 if setting.perceptron else max(1, 1024 // setting.batch // setting.depth)
            steps[setting, name] = partial(step, net.batch(), net.batch()), num_steps
    seconds = seconds_by_turns(steps, num_rounds)
    records = []
    for setting in settings:
        plain, ours = seconds[setting, "plain"], seconds[setting, "ours, forward"]
        low, middle, high = statistics.quantiles(
            (mine / reference for mine, reference in zip(ours, plain, strict=True)), n=4
        )
        phases = phase_seconds(setting.net(), "sgd", num_rounds)
        records.append(
            {
                "row": row,
                "value": getattr(setting, row),
                "parameters": setting.num_parameters(),
                "plain_ms": f"{1e3 * statistics.median(plain):.2f}",
                "ratio": f"{middle:.3f}",
                "ratio_low": f"{low:.3f}",
                "ratio_high": f"{high:.3f}",
                "update_share": f"{sum(phases[name] for name in UPDATE) / ours_total(phases):.4f}",
            }
        )
    return records


def ours_total(phases: dict[str, float]) -> float:
    return sum(seconds for name, seconds in phases.items() if not name.startswith("plain"))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The ratio against each thing varied, and the pseudo update's share against parameters."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    *ratios, share = figure.subplots(2, 3).flat
    panels = dict(zip(ROWS, [*ratios, ratios[-1]], strict=True))
    for row, panel in panels.items():
        own = [record for record in records if record["row"] == row]
        counted = panel is ratios[-1]
        x = [record["parameters" if counted else "value"] for record in own]
        low, middle, high = (
            [float(record[name]) for record in own] for name in ("ratio_low", "ratio", "ratio_high")
        )
        color = "#1d4ed8" if row == "perceptron" else "#c2410c"
        panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        panel.plot(
            x,
            middle,
            "o-",
            color=color,
            label="perceptron" if row == "perceptron" else "convolutions",
        )
        panel.set_xlabel(ROWS[row][0])
        panel.set_xscale("log", base=2)
        if counted:
            percent = [100 * float(record["update_share"]) for record in own]
            share.plot(x, percent, "o-", color=color)
        else:
            panel.set_xticks(x, map(str, x))
    top = 1.08 * max(float(record["ratio_high"]) for record in records)
    for panel in ratios:
        panel.axhline(10 / 3, color="#777777", linewidth=1, linestyle="--")
        panel.set_ylim(0, top)
    ratios[0].text(8, 3.25, "the count, 3.33", fontsize=9, color="#555555", va="top")
    ratios[-1].legend(frameon=False, loc="lower left")
    share.set_ylim(bottom=0)
    share.set_xlabel("parameters")
    share.set_ylabel("pseudo update, % of the step")
    for panel in (ratios[-1], share):
        panel.set_xscale("log")
    for panel in (*ratios, share):
        panel.minorticks_off()
        panel.grid(axis="y", color="#e5e5e5")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (ratios[0], ratios[3]):
        panel.set_ylabel("reweighted step / plain step")
    figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=9)
    settings = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; plain step = 1")
    print(f"{'varied':>8} {'value':>6} {'parameters':>11} {'plain ms':>9} {'ratio':>6}", end=" ")
    print(f"{'middle half':>13} {'update':>7}")
    records = []
    for row in settings.rows:
        for record in measure(row, settings.rounds):
            records.append(record)
            print(
                f"{row:>8} {record['value']:>6} {record['parameters']:>11} "
                f"{record['plain_ms']:>9} {float(record['ratio']):>6.2f} "
                f"{float(record['ratio_low']):>6.2f}–{float(record['ratio_high']):<6.2f} "
                f"{float(record['update_share']):>7.1%}",
                flush=True,
            )
    if settings.rows == list(ROWS):
        with (RESULTS / "growth.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        plot(records, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
