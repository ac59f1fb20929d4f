"""Tables and plots of docs/results.md from the rows in benchmarks/results/evidence, alone.

    python benchmarks/report.py

What stands in docs/results.md between ``<!-- NAME -->`` and ``<!-- end -->`` is written anew, and
the pictures in docs/results; the prose around is left as it is.
"""

import argparse
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from arms import ARMS
from evidence import RESULTS, read

HEADROOM = RESULTS.parent / "headroom.csv"
ROUNDS = (range(1), range(1, 3), range(3, 8))  # the seeds by which fixed weightings are chosen
CONVENTIONAL = 0  # the one of them whose weights are 1
DOCS = Path(__file__).parents[1] / "docs"
Row = dict[str, str]
Rows = dict[str, dict[int, Row]]  # by arm and seed

SIGMOID = "sigmoid, lr 1e-2, interval 10"
FROZEN = "frozen, learned on digits"
# What the arms of an experiment are compared with, if it was run, beside conventional training.
BASES = {"cheaper": ("sigmoid",), "digits-200": ("frozen random", "lr 1e-3")}
# What the plots show, if it was run: few enough lines to read.
PREDICTED, DIRECT = "predicted, interval 10", "direct weights"
BY_CLASS, OFTEN = "sigmoid, class, lr 1e-2, interval 10", "sigmoid, class, lr 1e-2"
TAIL = ("conventional", "class-balanced", SIGMOID, OFTEN)
CURVES = (
    "conventional",
    "frozen random",
    "published",
    "lr 1e-3",
    SIGMOID,
    BY_CLASS,
    PREDICTED,
    DIRECT,
)
PLOTTED = {
    "long-tail": TAIL,
    "long-tail-noise-20": TAIL,
    "fashion-2k-symmetric": ("conventional", SIGMOID, FROZEN),
    "noise-40": ("conventional", "Meta-Weight-Net", "L2RW", SIGMOID),
    "fashion-5k": ("conventional", "frozen random", "interval 10, lr 1e-3"),
    "cheaper": ("conventional", "sigmoid", "sigmoid, lr 1e-2", "softplus, lr 1e-2", SIGMOID),
}
COLORS = {
    "conventional": "#525252",
    "frozen random": "#0e7490",
    "published": "#c2410c",
    "lr 1e-3": "#7e22ce",
    "interval 10, lr 1e-3": "#c2410c",
    SIGMOID: "#15803d",
    FROZEN: "#c2410c",
    BY_CLASS: "#a16207",
    OFTEN: "#a16207",
    "class-balanced": "#0e7490",
    PREDICTED: "#c2410c",
    DIRECT: "#7e22ce",
    "Meta-Weight-Net": "#0e7490",
    "L2RW": "#7e22ce",
    "sigmoid": "#0e7490",
    "sigmoid, lr 1e-2": "#c2410c",
    "softplus, lr 1e-2": "#7e22ce",
}


def paired(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Mean paired difference and the half-width of its 95 % interval (Student's t).

    The half-width of a single pair is not a number.
    """
    differences = np.subtract(after, before)
    if len(differences) < 2:
        return float(differences.mean()), math.nan
    reach = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return float(differences.mean()), float(reach)


def load(path: Path) -> Rows:
    """The rows of an experiment, by arm in the order of ``ARMS`` and by seed."""
    rows: Rows = {}
    for row in sorted(read(path), key=lambda row: list(ARMS).index(row["arm"])):
        rows.setdefault(row["arm"], {})[int(row["seed"])] = row
    return rows


def split_diverged(rows: Rows) -> tuple[Rows, dict[str, int]]:
    """The runs that ended with finite weights, and how many of each arm did not."""
    kept, diverged = {}, {}
    for arm, mine in rows.items():
        kept[arm] = {seed: row for seed, row in mine.items() if "nan" not in row["moved"]}
        diverged[arm] = len(mine) - len(kept[arm])
    return {arm: mine for arm, mine in kept.items() if mine}, diverged


def column(rows: dict[int, Row], name: str, seeds: Sequence[int] | None = None) -> list[float]:
    """A column of these seeds, or of all."""
    return [float(rows[seed][name]) for seed in (sorted(rows) if seeds is None else seeds)]


def difference(rows: Rows, arm: str, base: str, name: str, base_name: str | None = None) -> str:
    """As text: mean difference ± half-width over the seeds both have, bold if clear of 0."""
    seeds = sorted(set(rows.get(arm, {})) & set(rows.get(base, {})))
    if not seeds or (arm == base and base_name in (None, name)):
        return ""
    mean, reach = paired(
        column(rows[arm], name, seeds), column(rows[base], base_name or name, seeds)
    )
    if math.isnan(reach):
        return f"{mean:+.2f}"
    text = f"{mean:+.2f} ± {reach:.2f}"
    return f"**{text}**" if abs(mean) > reach else text


def table(rows: Rows, bases: Sequence[str]) -> str:
    """One line for each arm; runs that diverged are counted, and left out of the means."""
    rows, diverged = split_diverged(rows)
    bases = ["conventional", *(base for base in bases if base in rows)]
    num_exits = sum(name.startswith("exit ") for name in next(iter(rows["conventional"].values())))
    noisy = any(not math.isnan(float(r["wrong weight"])) for a in rows.values() for r in a.values())
    heads = ["arm", "seeds", "accuracy" if num_exits == 1 else "budgeted"]
    heads += [f"− {base}" for base in bases]
    if num_exits > 1:
        heads += ["area", "exit 1", f"exit {num_exits}"]
    if noisy:
        heads += ["best epoch", "end − conventional's best", "weight clean / wrong"]
    heads += ["weights move", "time"]
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for arm, mine in rows.items():

        def against(name: str, base: str = "conventional", arm: str = arm) -> str:
            return difference(rows, arm, base, name)

        seeds = str(len(mine)) + (f" (and {diverged[arm]} diverged)" if diverged[arm] else "")
        cells = [arm, seeds, f"{np.mean(column(mine, 'budgeted')):.2f}"]
        cells += [against("budgeted", base) for base in bases]
        if num_exits > 1:
            cells += [against(name) for name in ("area", "exit 1", f"exit {num_exits}")]
        if noisy:
            cells.append(f"{np.mean(column(mine, 'best budgeted')):.2f}")
            cells.append(difference(rows, arm, "conventional", "budgeted", "best budgeted"))
            clean, wrong = (np.mean(column(mine, f"{kind} weight")) for kind in ("clean", "wrong"))
            cells.append(f"{clean:.2f} / {wrong:.2f}")
        cells.append(f"{np.mean([numbers(row, 'moved')[-1] for row in mine.values()]):.3f}")
        both = sorted(set(mine) & set(rows["conventional"]))
        seconds = [column(of, "seconds", both) for of in (mine, rows["conventional"])]
        cells.append(f"{np.mean(np.divide(*seconds)):.1f}" if both else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def numbers(row: Row, name: str) -> np.ndarray:
    """A cell that holds several."""
    return np.array(row[name].split(), dtype=float)


def plot_differences(path: Path, rows: Rows) -> None:
    """Each arm's paired difference to conventional training, with its interval and its seeds.

    Intervals may leave the picture, which is as wide as the differences need: of two seeds they
    can be ten times as wide.
    """
    rows, _ = split_diverged(rows)
    arms = [arm for arm in rows if arm != "conventional"]
    figure = Figure(figsize=(7, 0.9 + 0.27 * len(arms)), layout="constrained")
    axes = figure.add_subplot()
    everything = [0.0]
    for place, arm in enumerate(reversed(arms)):
        seeds = sorted(set(rows[arm]) & set(rows["conventional"]))
        if not seeds:
            continue
        after, before = (column(rows[name], "budgeted", seeds) for name in (arm, "conventional"))
        mean, reach = paired(after, before)
        if not math.isnan(reach):
            axes.plot([mean - reach, mean + reach], [place, place], color="#525252", linewidth=1.2)
        dots = np.subtract(after, before)
        everything.extend(dots)
        axes.plot(dots, [place] * len(dots), "o", color="#c2410c", alpha=0.45, markersize=3.5)
        axes.plot(mean, place, "|", color="black", markersize=9)
    axes.axvline(0, color="#525252", linewidth=1, linestyle="--")
    margin = 0.25 * np.ptp(everything)
    axes.set_xlim(min(everything) - margin, max(everything) + margin)
    axes.set_yticks(range(len(arms)), list(reversed(arms)), fontsize="small")
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel("difference to conventional training (points)")
    finish(figure, path)


def plot_curves(path: Path, rows: Rows, arms: Sequence[str]) -> None:
    """Budgeted curves: means over the seeds, and bands of the 95 % interval of the mean.

    Bands may leave the picture, which is as high as the seeds' own curves need.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    curves = {
        arm: [
            tuple(numbers(row, f"curve {part}") for part in ("cost", "accuracy"))
            for row in rows[arm].values()
        ]
        for arm in arms
    }
    lowest = max(cost.min() for each in curves.values() for cost, _ in each)
    highest = min(cost.max() for each in curves.values() for cost, _ in each)
    grid = np.linspace(lowest, highest, 100)
    seen = []
    for arm, each in curves.items():
        values = np.array(
            [
                np.interp(grid, *(part[np.argsort(cost)] for part in (cost, accuracy)))
                for cost, accuracy in each
            ]
        )
        seen.append(values)
        mean = values.mean(0)
        label = f"{arm} ({len(each)} seeds)" if len(each) > 1 else f"{arm} (1 seed)"
        axes.plot(grid / 1e3, mean, color=COLORS[arm], linewidth=1.8, label=label)
        if len(each) > 1:
            reach = stats.t.ppf(0.975, len(each) - 1) * stats.sem(values, 0)
            axes.fill_between(
                grid / 1e3, mean - reach, mean + reach, color=COLORS[arm], alpha=0.13, linewidth=0
            )
    everything = np.concatenate(seen)
    margin = 0.1 * np.ptp(everything)
    axes.set_ylim(everything.min() - margin, everything.max() + margin)
    axes.set_xlabel("mean cost of an answer (thousand multiply-adds)")
    axes.set_ylabel("test accuracy (%)")
    finish(figure, path)


def plot_weights(path: Path, rows: Rows, arms: Sequence[str]) -> None:
    """Mean weight of each tenth of the samples by loss, in the last epoch, one panel an exit."""
    num_exits = len(numbers(next(iter(rows[arms[0]].values())), "tenths loss")) // 10
    num_rows, num_columns = math.ceil(num_exits / 3), min(num_exits, 3)
    size = max(4.4, 2.4 * num_columns), 2.5 * num_rows + 0.9
    figure = Figure(figsize=size, layout="constrained")
    axes = None
    for k in range(num_exits):
        axes = figure.add_subplot(num_rows, num_columns, k + 1, sharey=axes)
        axes.axhline(1, color="#525252", linewidth=1, linestyle="--")
        for arm in arms:
            for index, row in enumerate(rows[arm].values()):
                losses, weights = (
                    numbers(row, f"tenths {kind}").reshape(-1, 10)[k] for kind in ("loss", "weight")
                )
                axes.plot(
                    losses.clip(1e-6),
                    weights,
                    ".-",
                    color=COLORS[arm],
                    alpha=0.5,
                    linewidth=0.9,
                    markersize=3,
                    label=arm if index == 0 else None,
                )
        axes.set_xscale("log")
        axes.set_title(f"exit {k + 1}" if num_exits > 1 else "", fontsize="medium")
    figure.supylabel("mean weight", fontsize="medium")
    figure.supxlabel("mean loss of a tenth of the samples", fontsize="medium")
    finish(figure, path)


def plot_movement(path: Path, rows: Rows, arms: Sequence[str]) -> None:
    """How far weights stand from 1, epoch by epoch."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes: Axes = figure.add_subplot()
    for arm in arms:
        moved = np.mean([numbers(row, "moved") for row in rows[arm].values()], 0)
        axes.plot(np.arange(1, len(moved) + 1), moved, color=COLORS[arm], label=arm)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean distance of weights from 1")
    finish(figure, path)


def plot_agreement(path: Path, rows: Rows, arms: Sequence[str]) -> None:
    """How often a right label, or else one of a rare class, outweighs another, epoch by epoch."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0.5, color="#525252", linewidth=1, linestyle="--")
    for arm in arms:
        seeds = np.array([numbers(row, "agreement") for row in rows[arm].values()]).T
        epochs = np.arange(1, len(seeds) + 1)
        axes.plot(epochs, seeds, color=COLORS[arm], linewidth=0.7, alpha=0.3)
        label = f"{arm} ({seeds.shape[1]} seeds)"
        axes.plot(epochs, seeds.mean(1), color=COLORS[arm], linewidth=1.8, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("area under the ROC curve")
    finish(figure, path)


def agrees(rows: dict[int, Row]) -> bool:
    """Whether every run has noted how its weights agree, and there was something to agree with."""
    return all(row["agreement"] and "nan" not in row["agreement"] for row in rows.values())


def finish(figure: Figure, path: Path) -> None:
    """Quiet axes, the legend above them, and the PNG."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        above = {"loc": "outside upper center", "ncols": 2}
        figure.legend(handles, labels, frameon=False, fontsize="small", **above)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def headroom(path: Path) -> str:
    """One line for each experiment: how fixed weightings do, and what the best come to."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for row in read(path):
        candidates = found.setdefault(row["experiment"], {})
        seeds = candidates.setdefault(int(row["candidate"]), {})
        seeds[int(row["seed"])] = float(row["budgeted"])
    lines = ["| experiment | weightings | better with seed 0 | best with seed 0 | the three best |"]
    lines.append("| --- | --: | --: | --: | --- |")
    for experiment, candidates in found.items():
        base = candidates.pop(CONVENTIONAL)
        first = [seeds[0] - base[0] for seeds in candidates.values()]
        last = []
        for seeds in candidates.values():
            if set(ROUNDS[-1]) <= set(seeds):
                values = ([of[seed] for seed in ROUNDS[-1]] for of in (seeds, base))
                last.append("{:+.2f} ± {:.2f}".format(*paired(*values)))
        better = sum(difference > 0 for difference in first)
        cells = [experiment, str(len(first)), str(better), f"{max(first):+.2f}", ", ".join(last)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(text: str, name: str, block: str) -> str:
    """The text with a new block between its markers, at the end if there are none."""
    begin, end = f"<!-- {name} -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    whole = f"{begin}\n{block}\n{end}"
    if pattern.search(text):
        return pattern.sub(lambda match: whole, text)
    return f"{text.rstrip()}\n\n## {name}\n\n{whole}\n"


def main(arguments: list[str] | None = None) -> None:
    """Write tables and pictures of every experiment that has rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--headroom", type=Path, default=HEADROOM)
    parser.add_argument("--docs", type=Path, default=DOCS)
    settings = parser.parse_args(arguments)
    page = settings.docs / "results.md"
    text = page.read_text() if page.exists() else "# Results\n"
    for path in sorted(settings.results.glob("*.csv")):
        rows, name = load(path), path.stem
        if "conventional" not in rows:
            continue
        chosen = [arm for arm in PLOTTED.get(name, CURVES) if arm in rows]
        plots = {}
        if len(rows) > 2:
            plots["differences"] = plot_differences
        if "exit 2" in next(iter(rows["conventional"].values())):
            plots["curves"] = partial(plot_curves, arms=chosen)
        if len(chosen) > 1:
            plots["weights"] = partial(plot_weights, arms=chosen[1:])
            plots["movement"] = partial(plot_movement, arms=chosen[1:])
        known = [arm for arm in chosen[1:] if agrees(rows[arm])]
        if known:
            plots["agreement"] = partial(plot_agreement, arms=known)
        blocks = [table(rows, BASES.get(name, ("frozen random",)))]
        for kind, plot in plots.items():
            plot(settings.docs / "results" / f"{name}-{kind}.png", rows)
            blocks.append(f"![{name}, {kind}](results/{name}-{kind}.png)")
        text = fill(text, name, "\n\n".join(blocks))
    if settings.headroom.exists():
        text = fill(text, "headroom", headroom(settings.headroom))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


if __name__ == "__main__":
    main()
