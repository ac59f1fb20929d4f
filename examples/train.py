"""Train a multi-exit net twice, conventionally and reweighted, and compare what its exits can do.

With no arguments: scikit-learn's digits and a small convolutional net, in about a minute. Both
trainings begin with the same parameters and see the same batches in the same order; they differ in
the weights of the samples alone. Under ``torchrun`` each process takes its share of every batch.
"""

import argparse
import csv
import io
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

import reweight
from checkpoint import Checkpoint, Stateful, save_aside, write_aside
from data import Data, augment, load_data
from msdnet import MSDNet
from ranet import RANet
from reweight import (
    BudgetedObjective,
    BudgetPoint,
    ExitLosses,
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
    budgeted_curve,
    exit_costs,
    exit_cross_entropy,
    swap_halves,
)
from reweight.plots import plot_budgeted_curves, plot_weights
from small import MultiExitConvNet, MultiExitMLP
from staged import StagedNet

ARMS = ("conventional", "reweighted")
MODELS: dict[str, Callable[[Data], StagedNet]] = {
    "mlp": lambda data: MultiExitMLP(data.input_shape, data.num_classes),
    "conv": lambda data: MultiExitConvNet(data.input_shape, data.num_classes),
    "msdnet": lambda data: MSDNet(data.num_classes, in_channels=data.input_shape[0]),
    "ranet": lambda data: RANet(data.num_classes, in_channels=data.input_shape[0]),
}


class Recipe(NamedTuple):
    """What suits a data set. Each step trains on half a batch; the other half is meta data."""

    model: str
    epochs: int
    batch_size: int
    lr: float


RECIPES = {
    "digits": Recipe("conv", epochs=20, batch_size=64, lr=0.05),
    "fashion-mnist": Recipe("conv", epochs=15, batch_size=256, lr=0.1),
    "cifar10": Recipe("msdnet", epochs=300, batch_size=128, lr=0.1),
    "cifar100": Recipe("msdnet", epochs=300, batch_size=128, lr=0.1),
    "imagefolder": Recipe("conv", epochs=90, batch_size=128, lr=0.1),
}


def main(arguments: list[str] | None = None) -> None:
    """Train both arms, or what is left of them, and report how they compare."""
    settings = parse_arguments(arguments)
    if dist.is_available() and dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank, num_ranks = rank_and_number()
    console = Console(quiet=rank > 0)
    if settings.data == "digits":
        torch.set_num_threads(1)  # faster for images of 8×8
    try:
        data = load_data(
            settings.data,
            settings.data_dir,
            seed=settings.seed,
            label_noise=settings.label_noise,
            long_tail=settings.long_tail,
            train_size=settings.train_size,
            download=settings.download,
        )
        checkpoint = Checkpoint(
            settings.out / "checkpoint.pt",
            describe(settings),
            resume=settings.resume,
            writes=rank == 0,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if len(data.train) < settings.batch_size:
        sys.exit(f"error: --batch-size must be at most {len(data.train)}, the training samples")
    if settings.batch_size % (2 * num_ranks) and num_ranks > 1:
        sys.exit(f"error: --batch-size must be a multiple of {2 * num_ranks}, two for each process")
    settings.out.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        if arm not in checkpoint.finished:
            train(arm, data, settings, checkpoint, console)
    if rank == 0:
        report(data, settings, checkpoint, console)
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_number() -> tuple[int, int]:
    """Which of how many processes this is."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The settings; what is not given comes from the recipe of the data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", choices=RECIPES, default="digits")
    add("--data-dir", type=Path, help="where the files are")
    add("--download", action="store_true", help="fetch missing files into the data directory")
    add("--train-size", type=int, help="train on so many samples (default: all)")
    add("--label-noise", type=float, default=0.0, help="share of the training labels made wrong")
    add("--long-tail", type=float, default=1.0, help="size of the first class over the last")
    add("--model", choices=MODELS, help="default: by data set")
    add("--epochs", type=int, help="default: by data set")
    add("--batch-size", type=int, help="each step trains on one half (default: by data set)")
    add("--lr", type=float, help="learning rate at the start (default: by data set)")
    add("--seed", type=int, default=0, help="of the split, the first parameters and the order")
    add("--objective", choices=("budgeted", "mean"), default="budgeted", help="the meta loss")
    add("--reweighter-input", choices=("losses", "confidences", "both"), default="losses")
    add("--interval", type=int, default=1, help="steps from one reweighter update to the next")
    add("--out", type=Path, help="folder for the results (default: runs/DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in that folder")
    settings = parser.parse_args(arguments)
    for name, value in RECIPES[settings.data]._asdict().items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    for name, least in (("epochs", 1), ("batch_size", 2), ("interval", 1)):
        if getattr(settings, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if settings.data == "imagefolder" and settings.model in ("msdnet", "ranet"):
        parser.error(f"--model {settings.model} is for small images; use --model conv")
    settings.out = settings.out or Path("runs", settings.data)
    return settings


def describe(settings: argparse.Namespace) -> dict[str, Any]:
    """Everything the result depends on, as plain values."""
    left_out = ("out", "resume", "download")
    values = {name: value for name, value in vars(settings).items() if name not in left_out}
    return {**values, "data_dir": settings.data_dir and str(settings.data_dir)}


def train(
    arm: str, data: Data, settings: argparse.Namespace, checkpoint: Checkpoint, console: Console
) -> None:
    """Train one arm, from where the checkpoint has it."""
    torch.manual_seed(settings.seed)
    bare = MODELS[settings.model](data)
    costs = costs_of(bare, data)
    model = DistributedDataParallel(bare) if dist.is_initialized() else bare
    optimizer = SGD(model.parameters(), settings.lr, 0.9, weight_decay=1e-4, nesterov=True)
    scheduler = CosineAnnealingLR(optimizer, settings.epochs)
    step = MetaReweightStep(
        model,
        optimizer,
        SampleReweighter(len(costs), inputs=settings.reweighter_input),
        objective=BudgetedObjective() if settings.objective == "budgeted" else MeanObjective(),
        interval=settings.interval,
    )
    parts: dict[str, Stateful] = {"model": bare, "optimizer": optimizer, "scheduler": scheduler}
    if arm == "reweighted":
        parts["step"] = step
    first_epoch = checkpoint.restore(arm, parts)

    num_steps = 2 * (len(data.train) // settings.batch_size)
    with progress_bar(console) as bar:
        task = bar.add_task(arm, total=settings.epochs * num_steps, epoch=0, losses="")
        for epoch in range(first_epoch, settings.epochs):
            torch.manual_seed(settings.seed * 1_000_003 + epoch)  # what an epoch draws is its own
            train_losses, meta_losses = [], []
            losses, weights = [], []
            model.train()
            for now, meta in swap_halves(training_batches(data, settings.batch_size)):
                optimizer.zero_grad()
                if arm == "reweighted":
                    result = step.backward(now, meta)
                    train_losses.append(result.train_loss.item())
                    if result.meta_loss is not None:
                        meta_losses.append(result.meta_loss.item())
                    losses.append(result.losses.losses)
                    weights.append(result.weights)
                else:
                    loss = exit_cross_entropy(model(now[0]), now[1]).losses.mean(0).sum()
                    loss.backward()
                    train_losses.append(loss.item())
                optimizer.step()
                text = f"train loss {mean(train_losses):.3f}"
                if meta_losses:
                    text += f", meta loss {mean(meta_losses):.3f}"
                bar.update(
                    task,
                    completed=epoch * num_steps + len(train_losses),
                    epoch=epoch + 1,
                    losses=text,
                )
            scheduler.step()
            if not console.is_terminal:
                console.print(f"{arm}: epoch {epoch + 1} of {settings.epochs}, {text}")
            if epoch + 1 < settings.epochs:
                checkpoint.save(arm, epoch + 1, parts)
    if step.num_skipped:
        console.print(f"{int(step.num_skipped)} updates of the reweighter skipped: not finite")
    left: dict[str, Any] = {"model": bare.state_dict()}
    if arm == "reweighted":
        left |= {
            "reweighter": step.reweighter.state_dict(),
            "losses": torch.cat(losses),
            "weights": torch.cat(weights),
        }
    checkpoint.finish(arm, left)


def training_batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, without the incomplete batch at the end: this process's share."""
    rank, _ = rank_and_number()
    for index, (images, target) in enumerate(batches_of(data.train, batch_size, shuffled=True)):
        if index == 0 and rank > 0:  # all have drawn the same order; now each draws its own
            torch.manual_seed(torch.initial_seed() + rank)
        yield (augment(images) if data.augment else images), target


class BatchShares(BatchSampler):
    """Every n-th sample of each batch, for one of n processes: a half is a half for all of them."""

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices."""
        rank, num_ranks = rank_and_number()
        for batch in super().__iter__():
            yield batch[rank::num_ranks]


def batches_of(dataset: Any, batch_size: int, *, shuffled: bool = False) -> Any:
    """A data loader; data in memory is indexed a whole batch at a time."""
    sampler: Sampler[int] = RandomSampler(dataset) if shuffled else SequentialSampler(dataset)
    batches = (BatchShares if shuffled else BatchSampler)(sampler, batch_size, drop_last=shuffled)
    if isinstance(dataset, TensorDataset):
        return DataLoader(dataset, sampler=batches, batch_size=None)
    return DataLoader(dataset, batch_sampler=batches)


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Any) -> ExitLosses:
    """Every exit on every sample; in float64, so that confident samples do not tie."""
    model.eval()
    parts = [
        exit_cross_entropy([logits.double() for logits in model(images)], target)
        for images, target in batches_of(dataset, 500)
    ]
    return ExitLosses.cat(parts)


def costs_of(model: nn.Module, data: Data) -> list[int]:
    """Multiply-adds at every exit for one image; these models compute their exits in order."""
    return exit_costs(model, data.test[0][0].unsqueeze(0), in_order=True)


def report(
    data: Data, settings: argparse.Namespace, checkpoint: Checkpoint, console: Console
) -> None:
    """Evaluate both arms; print the table, write numbers, models and plots."""
    model = MODELS[settings.model](data)
    costs = costs_of(model, data)
    correct: dict[str, Tensor] = {}
    curves: dict[str, list[BudgetPoint]] = {}
    for arm in ARMS:
        model.load_state_dict(checkpoint.finished[arm]["model"])
        test = evaluate(model, data.test)
        assert test.correct is not None
        correct[arm] = test.correct
        curves[arm] = budgeted_curve(evaluate(model, data.calibration), test, costs)
        thresholds = {point.power: point.thresholds for point in curves[arm]}
        save_aside(
            settings.out / f"{arm}.pt",
            {"model": model.state_dict(), "thresholds": thresholds, "settings": describe(settings)},
        )
    anytime = {arm: correct[arm].double().mean(0) for arm in ARMS}
    budgeted = {arm: mean([point.accuracy for point in curves[arm]]) for arm in ARMS}

    table = Table(title=f"{settings.data}, {settings.model}: test accuracy (%)")
    for heading in ("exit", "multiply-adds", *ARMS, "difference"):
        table.add_column(heading, justify="right")
    differences = correct["reweighted"].double() - correct["conventional"].double()
    errors = differences.std(0) / len(differences) ** 0.5
    for k, cost in enumerate(costs):
        before, after = (100 * anytime[arm][k].item() for arm in ARMS)
        table.add_row(
            str(k + 1),
            f"{cost:,}",
            f"{before:.2f}",
            f"{after:.2f}",
            f"{after - before:+.2f} ± {100 * errors[k].item():.2f}",
        )
    before, after = (100 * budgeted[arm] for arm in ARMS)
    table.add_section()
    table.add_row(
        "budgeted", "mean of 39", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"
    )
    console.print(table)
    console.print(
        "± is one standard error over the test samples, for this seed alone; another seed gives "
        "another difference.",
        style="dim",
    )

    title = f"{settings.data}, {settings.model}, seed {settings.seed}"
    figure = plot_budgeted_curves(curves, costs, anytime, title=title)
    save_figure(settings.out / "budgeted.png", figure)
    reweighted = checkpoint.finished["reweighted"]
    figure = plot_weights(
        reweighted["losses"],
        reweighted["weights"],
        title=f"{title}: weights in the last epoch",
    )
    save_figure(settings.out / "weights.png", figure)
    results = {
        "settings": describe(settings),
        "versions": {
            "reweight": reweight.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": costs,
        "arms": {
            arm: {
                "anytime_accuracy": anytime[arm].tolist(),
                "mean_budgeted_accuracy": budgeted[arm],
                "budgeted": [as_plain(point) for point in curves[arm]],
            }
            for arm in ARMS
        },
    }
    write_aside(settings.out / "results.json", json.dumps(results, indent=1).encode())
    write_aside(settings.out / "results.csv", as_csv(settings, costs, anytime, curves).encode())
    console.print(
        f"written to {settings.out}: {', '.join(sorted(p.name for p in settings.out.iterdir()))}"
    )


def save_figure(path: Path, figure: Figure) -> None:
    """The figure as PNG, in one go."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_aside(path, buffer.getvalue())


def as_plain(point: BudgetPoint) -> dict[str, Any]:
    """A point of the curve for JSON, which has no infinity: null is a threshold none reaches."""
    thresholds = [t if abs(t) < float("inf") else None for t in point.thresholds[:-1].tolist()]
    return {**point._asdict(), "thresholds": thresholds, "shares": point.shares.tolist()}


def as_csv(
    settings: argparse.Namespace,
    costs: list[int],
    anytime: dict[str, Tensor],
    curves: dict[str, list[BudgetPoint]],
) -> str:
    """One row for each exit alone and each budget, with the settings in every row."""
    text = io.StringIO()
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        for k, accuracy in enumerate(anytime[arm].tolist()):
            rows.append({"arm": arm, "exit": k + 1, "cost": costs[k], "accuracy": accuracy})
        for point in curves[arm]:
            rows.append(
                {"arm": arm, "power": point.power, "cost": point.cost, "accuracy": point.accuracy}
            )
    columns = ["arm", "exit", "power", "cost", "accuracy", *describe(settings)]
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({**describe(settings), **row} for row in rows)
    return text.getvalue()


def progress_bar(console: Console) -> Progress:
    """Arm, epoch, running losses, steps and the time left; on a terminal only."""
    return Progress(
        TextColumn("{task.description}, epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
        disable=not console.is_terminal,
    )


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
