"""Train a multi-exit net twice, conventionally and reweighted, and compare what its exits can do.

With no arguments: scikit-learn's digits, of which 40 % have a wrong label, a small convolutional
net of five exits, and 100 samples with right labels to judge by. Both trainings begin with the same
parameters and see the same batches in the same order; they differ in the weights of the samples
alone. Under ``torchrun`` each process takes its share of every batch.
"""

import argparse
import csv
import io
import json
import platform
import sys
from collections.abc import Callable, Iterator
from itertools import count
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
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
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
    DirectWeights,
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
FORMS = ("predicted", "direct", "sigmoid", "tanh")
MODELS: dict[str, Callable[[Data], StagedNet]] = {
    "mlp": lambda data: MultiExitMLP(data.input_shape, data.num_classes),
    "conv": lambda data: MultiExitConvNet(data.input_shape, data.num_classes),
    "msdnet": lambda data: MSDNet(data.num_classes, in_channels=data.input_shape[0]),
    "ranet": lambda data: RANet(data.num_classes, in_channels=data.input_shape[0]),
}


class Recipe(NamedTuple):
    """What suits a data set."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    label_noise: float
    meta_size: int


RECIPES = {
    "digits": Recipe("conv", 20, 64, 0.05, label_noise=0.4, meta_size=100),
    "fashion-mnist": Recipe("conv", 15, 256, 0.1, label_noise=0.4, meta_size=1000),
    "cifar10": Recipe("msdnet", 300, 128, 0.1, label_noise=0.0, meta_size=1000),
    "cifar100": Recipe("msdnet", 300, 128, 0.1, label_noise=0.0, meta_size=1000),
    "imagefolder": Recipe("conv", 90, 128, 0.1, label_noise=0.0, meta_size=1000),
}
ADAMW_LR = 1e-3


class Method(NamedTuple):
    """What suits the labels: of wrong ones, clean samples are the judge; else each other half."""

    form: str
    meta: str
    objective: str
    interval: int


NOISY = {
    "symmetric": Method("sigmoid", meta="held-out", objective="mean", interval=10),
    "neighbour": Method("predicted", meta="held-out", objective="mean", interval=10),
}
CLEAN = Method("tanh", meta="halves", objective="budgeted", interval=1)


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
            neighbours=settings.noise == "neighbour",
            long_tail=settings.long_tail,
            train_size=settings.train_size,
            meta_size=settings.meta_size,
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
    console.print(introduction(data, settings))
    for arm in ARMS:
        if arm not in checkpoint.finished:
            train(arm, data, settings, checkpoint, console)
    if rank == 0:
        report(data, settings, checkpoint, console)
    if dist.is_initialized():
        dist.destroy_process_group()


def introduction(data: Data, settings: argparse.Namespace) -> str:
    """What is about to be trained, with the defaults that were chosen."""
    wrong = f"{settings.label_noise:.0%} wrong labels ({settings.noise})"
    judge = "the other half of each batch"
    if data.meta is not None:
        judge = f"{len(data.meta)} held-out samples with right labels"
    lines = [
        f"{settings.data}, {len(data.train):,} training samples, "
        + (wrong if settings.label_noise else "right labels"),
        f"--model {settings.model} --optimizer {settings.optimizer} --lr {settings.lr:g} "
        f"--epochs {settings.epochs} --batch-size {settings.batch_size}",
        f"--form {settings.form} --objective {settings.objective} --interval {settings.interval}, "
        f"judged by {judge}",
    ]
    if not settings.label_noise and settings.long_tail == 1:
        lines.append("With right labels and all classes alike, expect no difference but by chance.")
    return "\n".join(lines)


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
    add("--label-noise", type=float, help="share of wrong training labels (default: by data set)")
    add("--noise", choices=("symmetric", "neighbour"), default="symmetric", help="any, or the next")
    add("--long-tail", type=float, default=1.0, help="size of the first class over the last")
    add("--meta", choices=("halves", "held-out"), help="what judges (default: by label noise)")
    add("--meta-size", type=int, help="held-out samples with right labels (default: by data set)")
    add("--model", choices=MODELS, help="default: by data set")
    add("--epochs", type=int, help="default: by data set")
    add("--batch-size", type=int, help="halves: a step trains on one (default: by data set)")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd")
    add("--lr", type=float, help="learning rate at the start (default: by data set)")
    add("--amp", action="store_true", help="forward in bfloat16")
    add("--seed", type=int, default=0, help="of the split, the first parameters and the order")
    add("--form", choices=FORMS, help="of the weights (default: by label noise)")
    add("--objective", choices=("budgeted", "mean"), help="meta loss (default: by label noise)")
    add("--reweighter-input", choices=("losses", "confidences", "both"), default="losses")
    add("--interval", type=int, help="steps between updates (default: by label noise)")
    add("--out", type=Path, help="folder for the results (default: runs/DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in that folder")
    settings = parser.parse_args(arguments)
    if settings.optimizer == "adamw" and settings.lr is None:
        settings.lr = ADAMW_LR
    fill(settings, RECIPES[settings.data])
    method = NOISY[settings.noise] if settings.label_noise else CLEAN
    if settings.form in ("direct", "predicted"):
        method = method._replace(objective="mean")
    if settings.form == "direct":
        method = method._replace(interval=1)
    fill(settings, method)
    if settings.meta == "halves":
        settings.meta_size = 0
    for name, least in (("epochs", 1), ("batch_size", 2), ("interval", 1), ("meta_size", 0)):
        if getattr(settings, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if settings.form == "direct" and settings.interval > 1:
        parser.error("--interval must be 1 for direct weights: each batch has its own")
    if settings.data == "imagefolder" and settings.model in ("msdnet", "ranet"):
        parser.error(f"--model {settings.model} is for small images; use --model conv")
    settings.out = settings.out or Path("runs", settings.data)
    return settings


def fill(settings: argparse.Namespace, defaults: NamedTuple) -> None:
    """Set what was not given."""
    for name, value in defaults._asdict().items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


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
    optimizer: Optimizer
    if settings.optimizer == "sgd":
        optimizer = SGD(model.parameters(), settings.lr, 0.9, weight_decay=1e-4, nesterov=True)
    else:
        optimizer = AdamW(model.parameters(), settings.lr)
    scheduler = CosineAnnealingLR(optimizer, settings.epochs)
    step = MetaReweightStep(
        model,
        optimizer,
        reweighter_for(len(costs), data, settings),
        objective=BudgetedObjective() if settings.objective == "budgeted" else MeanObjective(),
        interval=settings.interval,
    )
    parts: dict[str, Stateful] = {"model": bare, "optimizer": optimizer, "scheduler": scheduler}
    if arm == "reweighted":
        parts["step"] = step
    first_epoch = checkpoint.restore(arm, parts)

    num_steps = (1 if data.meta else 2) * (len(data.train) // settings.batch_size)
    wrong = data.train_clean_labels != labels_of(data.train)
    half = torch.autocast("cpu", torch.bfloat16, enabled=settings.amp)
    with progress_bar(console) as bar:
        task = bar.add_task(arm, total=settings.epochs * num_steps, epoch=0, losses="")
        for epoch in range(first_epoch, settings.epochs):
            torch.manual_seed(settings.seed * 1_000_003 + epoch)  # what an epoch draws is its own
            train_losses, meta_losses = [], []
            seen: list[tuple[Tensor, Tensor, Tensor]] = []
            model.train()
            for ((images, rows), target), ((judges, _), right) in steps_of_epoch(data, settings):
                optimizer.zero_grad()
                if arm == "reweighted":
                    with half:
                        result = step.backward((images, target), (judges, right))
                    train_losses.append(result.train_loss.item())
                    if result.meta_loss is not None:
                        meta_losses.append(result.meta_loss.item())
                    seen.append((result.losses.losses, result.weights, wrong[rows]))
                else:
                    with half:
                        loss = exit_cross_entropy(model(images), target).losses.mean(0).sum()
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
        names = ("losses", "weights", "wrong")
        left |= dict(zip(names, map(torch.cat, zip(*seen, strict=True)), strict=True))
        left["reweighter"] = step.reweighter.state_dict()
    checkpoint.finish(arm, left)


def reweighter_for(
    num_exits: int, data: Data, settings: argparse.Namespace
) -> SampleReweighter | DirectWeights:
    """The one that was asked for."""
    if settings.form == "direct":
        return DirectWeights(num_exits)
    if settings.form == "predicted":
        return SampleReweighter(num_exits, form="predicted", num_classes=data.num_classes)
    return SampleReweighter(num_exits, form=settings.form, inputs=settings.reweighter_input)


def steps_of_epoch(data: Data, settings: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """What each step trains on, as ((images, rows), target), and what judges it, the same."""
    order = torch.Generator().manual_seed(torch.initial_seed())  # the same for every process
    batches = training_batches(data.train, data, settings.batch_size, order)
    if data.meta is None:
        yield from swap_halves(batches)
        return
    size = min(settings.batch_size, len(data.meta))
    endless = (batch for _ in count() for batch in training_batches(data.meta, data, size, order))
    yield from zip(batches, endless, strict=False)


def training_batches(
    dataset: Any, data: Data, batch_size: int, order: torch.Generator | None = None
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """One epoch in random order, without the incomplete batch at the end: this process's share."""
    rank, _ = rank_and_number()
    batches = batches_of(WithRows(dataset), batch_size, shuffled=True, order=order)
    for index, (images, target, rows) in enumerate(batches):
        if index == 0 and rank > 0:  # all have drawn the same order; now each draws its own
            torch.manual_seed(torch.initial_seed() + rank)
        yield ((augment(images) if data.augment else images), rows), target


class WithRows(Dataset[Any]):
    """Every sample with its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Any) -> tuple[Any, ...]:
        return (*self.dataset[rows], torch.as_tensor(rows))


class BatchShares(BatchSampler):
    """Every n-th sample of each batch, for one of n processes: a half is a half for all of them."""

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices."""
        rank, num_ranks = rank_and_number()
        for batch in super().__iter__():
            yield batch[rank::num_ranks]


def batches_of(
    dataset: Any, batch_size: int, *, shuffled: bool = False, order: torch.Generator | None = None
) -> Any:
    """A data loader; data in memory is indexed a whole batch at a time."""
    sampler: Sampler[int] = SequentialSampler(dataset)
    if shuffled:
        sampler = RandomSampler(dataset, generator=order)
    batches = (BatchShares if shuffled else BatchSampler)(sampler, batch_size, drop_last=shuffled)
    if isinstance(getattr(dataset, "dataset", dataset), TensorDataset):
        return DataLoader(dataset, sampler=batches, batch_size=None)
    return DataLoader(dataset, batch_sampler=batches)


def labels_of(dataset: Any) -> Tensor:
    """Those that are trained on."""
    labels: Tensor = dataset.tensors[1] if isinstance(dataset, TensorDataset) else dataset.labels
    return labels


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
    losses, weights, wrong = (reweighted[name] for name in ("losses", "weights", "wrong"))
    groups = {"right labels": ~wrong, "wrong labels": wrong} if wrong.any() else None
    title = f"{title}: weights in the last epoch"
    figure = plot_weights(losses, weights, title=title, groups=groups)
    for name, chosen in (groups or {}).items():
        console.print(f"mean weight of {name} in the last epoch: {weights[chosen].mean():.2f}")
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
