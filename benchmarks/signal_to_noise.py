"""How much of the hypergradient is signal: does the next batch ask for the same weights?

    python benchmarks/signal_to_noise.py --experiment fashion-5k

Trains conventionally, stops at some epochs, and there takes the hypergradients ∂L_meta/∂w (at
weights of 1) of many pairs of batches with the model held still. One row of CSV for each epoch,
source of meta data and objective:

* ``cosine``: mean cosine between two pairs' gradients in the parameters of a reweighter as
  published. A sum of n of them has as much signal as noise at n ≈ 1/cosine.
* ``tenths``: hypergradient by tenth of the losses at each exit, in units of its standard error over
  the pairs. Below 0: these samples should weigh more.
* ``gain``: first-order decrease of the meta loss in one step, as a share of what the step itself
  gives, for weights in the bounds of the tanh form at strength 0.8: "free", chosen for each
  sample by the derivative of this very pair; "by loss", chosen for each tenth and exit by the mean
  over the other pairs. What an ideal reweighter of losses could do at best.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from arms import AREA, ARMS, STRENGTH, FreeWeights
from evidence import EXPERIMENTS, Run, append, splits
from reweight import (
    BudgetedObjective,
    ExitLosses,
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
)

RESULTS = Path(__file__).parent / "results" / "signal_to_noise.csv"
OBJECTIVES = {"budgeted": BudgetedObjective(), "mean": MeanObjective(), "area": AREA}


def hypergradients(
    run: Run, meta_from: str, objective: Any, num_pairs: int
) -> list[tuple[ExitLosses, Tensor]]:
    """Losses and hypergradients [B, K] of so many pairs; the run stays as it is."""
    weights = FreeWeights(
        run.experiment.num_exits, run.experiment.batch_size, 1.0, lambda descent: descent
    )
    step = MetaReweightStep(
        run.model,
        run.optimizer,
        weights,
        reweighter_optimizer=torch.optim.SGD(weights.parameters(), 1.0),
        objective=objective,
    )
    run.model.train()
    run.meta_from, found = meta_from, []
    while len(found) < num_pairs:
        for train, meta in run.pairs():
            result = step.update_reweighter(train.batch(False), meta.batch(False))
            found.append((result.losses, -weights.descent.detach().clone()))
            if len(found) == num_pairs:
                break
    return found


def mean_cosine(vectors: Tensor) -> float:
    """Mean over all pairs of different rows [N, D]."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    total, num = unit.sum(0).square().sum(), len(unit)
    return ((total - num) / (num * (num - 1))).item()


def by_tenth(losses: Tensor, values: Tensor, edges: Tensor) -> Tensor:
    """Sums of the values in each tenth of the losses at each exit, [K, 10]."""
    tenth = torch.stack(
        [torch.bucketize(row, edge) for row, edge in zip(losses.T, edges, strict=True)]
    )
    return torch.zeros(len(tenth), 10).scatter_add_(1, tenth, values.T)


def bounded(descent: Tensor, dim: int) -> Tensor:
    """The change of weights within the bounds that gains most: ± strength, its mean taken off.

    The mean over the exits, or over the samples where there is one exit.
    """
    sign = (descent - descent.mean(dim, keepdim=True)).sign()
    return STRENGTH * (sign - sign.mean(dim, keepdim=True))


def measure(pairs: Sequence[tuple[ExitLosses, Tensor]], seed: int) -> dict[str, Any]:
    """The columns of a row."""
    torch.manual_seed(seed)
    num_exits = pairs[0][1].shape[1]
    reweighter = SampleReweighter(num_exits)
    gradients = []
    for losses, value in pairs:
        reweighter.zero_grad()
        reweighter(losses).backward(value)
        gradients.append(torch.cat([p.grad.flatten() for p in reweighter.parameters()]))
    everything = torch.cat([losses.losses for losses, _ in pairs])
    edges = everything.quantile(torch.arange(1, 10) / 10, dim=0).T.contiguous()
    tenths = torch.stack([by_tenth(losses.losses, value, edges) for losses, value in pairs])
    mean, error = tenths.mean(0), tenths.std(0) / math.sqrt(len(pairs))
    free, by_loss, step = [], [], []
    dim = 0 if num_exits == 1 else 1
    for index, (losses, value) in enumerate(pairs):
        step.append(value.sum())  # to first order, what all weights of 1 do to the meta loss
        free.append((bounded(-value, dim) * value).sum())
        others = torch.cat([tenths[:index], tenths[index + 1 :]]).mean(0)
        ruled = torch.stack(
            [others[k][torch.bucketize(losses.losses[:, k], edges[k])] for k in range(num_exits)], 1
        )
        by_loss.append((bounded(-ruled, dim) * value).sum())
    whole = torch.stack(step).mean()
    return {
        "pairs": len(pairs),
        "cosine": mean_cosine(torch.stack(gradients)),
        "gain free": (torch.stack(free).mean() / whole).item(),
        "gain by loss": (torch.stack(by_loss).mean() / whole).item(),
        "step": whole.item(),
        "tenths loss": [
            everything[:, k].sort().values.tensor_split(10)[t].mean().item()
            for k in range(num_exits)
            for t in range(10)
        ],
        "tenths": (mean / error).flatten().tolist(),
    }


def main() -> None:
    """Measure at the epochs asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 10, 25])
    parser.add_argument(
        "--meta", nargs="+", choices=("halves", "extra"), default=["halves", "extra"]
    )
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["budgeted"])
    parser.add_argument("--pairs", type=int, default=60)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    experiment = EXPERIMENTS[settings.experiment]
    run = Run(experiment, ARMS["conventional"], settings.seed)
    run.pool = splits(experiment, settings.seed)["extra"]
    done = 0
    with Progress() as progress:
        for epoch in settings.epochs:
            run.meta_from = "halves"
            for each in progress.track(range(done, epoch), description=f"to epoch {epoch}"):
                run.train_epoch(each)
            done = epoch
            for meta in settings.meta:
                for objective in settings.objectives:
                    pairs = hypergradients(run, meta, OBJECTIVES[objective], settings.pairs)
                    row = {
                        "experiment": settings.experiment,
                        "seed": settings.seed,
                        "epoch": epoch,
                        "meta": meta,
                        "objective": objective,
                        **measure(pairs, settings.seed),
                    }
                    append(RESULTS, row)
                    print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)


if __name__ == "__main__":
    main()
