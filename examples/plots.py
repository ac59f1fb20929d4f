"""The two pictures of a run: accuracy within a budget, and what weight a loss is given."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from checkpoint import write_aside
from reweight import BudgetPoint

COLORS = {"conventional": "#777777", "reweighted": "#c2410c"}


def plot_budgeted_curves(
    path: Path,
    curves: Mapping[str, Sequence[BudgetPoint]],
    anytime: Mapping[str, Tensor],
    costs: Sequence[int],
    title: str,
) -> None:
    """Test accuracy against the mean cost of an answer, one line for each training.

    Args:
        path: the PNG to write.
        curves: budgeted curve by name.
        anytime: accuracy of every exit [K] by name; drawn as dots at its cost.
        costs: multiply-adds at every exit, length K.
        title: above the plot.
    """
    unit, name = (
        (1e6, "million multiply-adds") if costs[0] >= 1e5 else (1e3, "thousand multiply-adds")
    )
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for arm, points in curves.items():
        color = COLORS[arm]
        axes.plot(
            [point.cost / unit for point in points],
            [100 * point.accuracy for point in points],
            color=color,
            linewidth=2,
            label=f"{arm}, within a budget",
        )
        axes.plot(
            [cost / unit for cost in costs],
            100 * anytime[arm],
            "o",
            color=color,
            markerfacecolor="white",
            label=f"{arm}, each exit alone",
        )
    axes.set_xlabel(f"mean cost of an answer ({name})")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title)
    axes.legend(frameon=False, loc="lower right")
    _finish(figure, path)


def plot_weights(path: Path, losses: Tensor, weights: Tensor, title: str) -> None:
    """The learned weight of every training sample against its loss, one panel for each exit.

    Args:
        path: the PNG to write.
        losses: shape [N, K].
        weights: shape [N, K].
        title: above the panels.
    """
    finite = losses.isfinite().all(1) & weights.isfinite().all(1)
    losses, weights = losses[finite], weights[finite]
    num_exits = losses.shape[1]
    figure = Figure(figsize=(2.3 * num_exits + 0.6, 2.9), layout="constrained")
    panels = figure.subplots(1, num_exits, sharex=True, sharey=True, squeeze=False)[0]
    for k, axes in enumerate(panels):
        axes.axhline(1, color=COLORS["conventional"], linewidth=1, linestyle="--")
        axes.scatter(
            losses[:, k].clamp(min=1e-6),
            weights[:, k],
            s=4,
            alpha=0.25,
            color=COLORS["reweighted"],
            linewidths=0,
            rasterized=True,
        )
        axes.set_xscale("log")
        axes.set_xticks([1e-5, 1e-3, 1e-1])
        axes.set_xlim(1e-6, 2 * max(losses.max().item(), 1) if len(losses) else 1)
        axes.set_title(f"exit {k + 1}", fontsize="medium")
    panels[0].set_ylabel("weight")
    figure.supxlabel("loss of the sample at this exit", fontsize="medium")
    figure.suptitle(title)
    _finish(figure, path)


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_aside(path, buffer.getvalue())
