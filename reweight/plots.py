"""Pictures of a run, as figures of matplotlib (extra ``plot``): ``figure.savefig(path)``."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from torch import Tensor

from reweight.budget import BudgetPoint

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("reweight.plots needs matplotlib: pip install 'reweight[plot]'.") from error

COLORS = ("#777777", "#c2410c", "#2563eb", "#0f766e", "#9333ea", "#b45309")


def plot_budgeted_curves(
    curves: Mapping[str, Sequence[BudgetPoint]],
    costs: Sequence[float] | None = None,
    anytime: Mapping[str, Tensor] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Test accuracy against the mean cost of an answer, one line for each training.

    Args:
        curves: what ``budgeted_curve`` returned, by name; the first is drawn in grey.
        costs: multiply-adds at every exit, length K; for the dots of ``anytime``.
        anytime: accuracy of every exit [K] by name, drawn as dots at its cost. Default: none.
        title: above the plot.

    Example:
        >>> import torch
        >>> from reweight import ExitLosses, budgeted_curve
        >>> confidence = torch.rand(50, 2)
        >>> losses = ExitLosses(torch.rand(50, 2), confidence, confidence > 0.5)
        >>> curve = budgeted_curve(losses, losses, costs=[1e6, 3e6])
        >>> figure = plot_budgeted_curves({"conventional": curve}, title="random")
        >>> figure.axes[0].get_xlabel()
        'mean cost of an answer (million multiply-adds)'
    """
    largest = max(point.cost for points in curves.values() for point in points)
    unit, name = (1e6, "million") if largest >= 1e5 else (1e3, "thousand")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (arm, points) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        axes.plot(
            [point.cost / unit for point in points],
            [100 * point.accuracy for point in points],
            color=color,
            linewidth=2,
            label=f"{arm}, within a budget",
        )
        if anytime is not None and costs is not None:
            axes.plot(
                [cost / unit for cost in costs],
                100 * anytime[arm],
                "o",
                color=color,
                markerfacecolor="white",
                label=f"{arm}, each exit alone",
            )
    axes.set(xlabel=f"mean cost of an answer ({name} multiply-adds)", ylabel="test accuracy (%)")
    axes.set_title(title)
    axes.legend(frameon=False, loc="lower right")
    return _plain(figure)


def plot_shares(points: Sequence[BudgetPoint], *, title: str = "") -> Figure:
    """The share of the test samples that each exit answers, against the mean cost of an answer.

    Args:
        points: what ``budgeted_curve`` returned.
        title: above the plot.
    """
    points = sorted(points, key=lambda point: point.cost)
    num_exits = len(points[0].shares)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    bottom = [0.0] * len(points)
    for k in range(num_exits):
        top = [low + 100 * p.shares[k].item() for low, p in zip(bottom, points, strict=True)]
        depth = 0.25 + 0.75 * (k + 1) / num_exits
        costs = [point.cost for point in points]
        axes.fill_between(
            costs, bottom, top, color=COLORS[1], alpha=depth, linewidth=0, label=f"exit {k + 1}"
        )
        bottom = top
    axes.set(xlabel="mean cost of an answer (multiply-adds)", ylabel="share of samples (%)")
    axes.set_title(title)
    axes.margins(0)
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    return _plain(figure)


def plot_weights(
    losses: Tensor,
    weights: Tensor,
    *,
    title: str = "",
    groups: Mapping[str, Tensor] | None = None,
) -> Figure:
    """The learned weight of every sample against its loss, one panel for each exit.

    Args:
        losses: shape [N, K], as of ``result.losses.losses``; rows that are not finite are left out.
        weights: shape [N, K], as of ``result.weights``.
        title: above the panels.
        groups: name → which of the samples, [N] bool, as of right and of wrong labels; each is
            drawn in a colour of its own. Default: all in one.

    Example:
        >>> import torch
        >>> from reweight import SampleReweighter
        >>> losses = torch.rand(100, 3)
        >>> figure = plot_weights(losses, SampleReweighter(3)(losses).detach())
        >>> len(figure.axes)
        3
    """
    finite = losses.isfinite().all(1) & weights.isfinite().all(1)
    losses, weights = losses[finite], weights[finite]
    drawn: dict[str, Any] = (
        {name: rows[finite] for name, rows in groups.items()} if groups else {"": ...}
    )
    colors = (COLORS[2], COLORS[1], *COLORS[3:]) if groups else COLORS[1:]
    num_exits = losses.shape[1]
    num_rows, num_columns = math.ceil(num_exits / 3), min(num_exits, 3)
    size = 2.4 * num_columns + 0.6, 2.3 * num_rows + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = None
    for k in range(num_exits):
        axes = figure.add_subplot(num_rows, num_columns, k + 1, sharex=axes, sharey=axes)
        axes.axhline(1, color=COLORS[0], linewidth=1, linestyle="--")
        for color, (name, rows) in zip(cycle(colors), drawn.items(), strict=False):
            axes.scatter(
                losses[rows, k].clamp(min=1e-6),
                weights[rows, k],
                s=4,
                alpha=0.25,
                color=color,
                linewidths=0,
                rasterized=True,
                label=name,
            )
        axes.set_xscale("log")
        axes.set_xticks([1e-5, 1e-3, 1e-1])
        axes.set_xlim(1e-6, 2 * max(losses.max().item(), 1) if len(losses) else 1)
        axes.set_title(f"exit {k + 1}", fontsize="medium")
        if k >= num_exits - num_columns:  # nothing is below it
            axes.set_xlabel("loss of the sample")
    figure.supylabel("weight", fontsize="medium")
    if groups:
        handles = figure.axes[0].get_legend_handles_labels()
        legend = figure.legend(
            *handles,
            loc="outside lower center",
            ncols=len(groups),
            frameon=False,
            markerscale=3,
            fontsize="small",
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)
    figure.suptitle(title)
    return _plain(figure)


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure
