"""A small decoder with an exit after every second layer, on the English that comes with Python.

The texts are Python's help topics and the docstrings of its standard library; a tenth of them is
held out for the thresholds, a tenth for the test. Every token is a sample with a weight at each
exit. Three trainings see the same batches: conventional, with the fixed weights of LayerSkip's
early-exit loss (Elhoushi et al., ACL 2024, equations 5 and 6, without a curriculum), and with
learned weights.

    pip install -e ".[examples,huggingface]"
    python examples/language_model.py --seeds 0                       # 6 minutes on one core
    python examples/language_model.py --logger tensorboard            # or trackio
"""

import argparse
import ast
import csv
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaModel

from reweight import (
    ExitLosses,
    MetaReweightStep,
    SampleReweighter,
    anytime_accuracy,
    budgeted_curve,
    choose_exits,
    exit_costs,
    exit_shares,
    find_thresholds,
    linear_exit_cross_entropy,
    swap_halves,
)
from reweight.integrations.huggingface import HiddenStateExits

ARMS = ("conventional", "LayerSkip", "reweighted")
LAYERS = (2, 4, 6)
LENGTH = 64
VOCABULARY = 2048
WIDTH = 128

Log = Callable[[dict[str, Any], int], None]


def load_texts() -> list[str]:
    """Python's help topics and the docstrings of each module of its standard library."""
    texts = list(topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        texts.append("\n\n".join(filter(None, found)))
    return texts


def load_tokens(seed: int) -> list[Tensor]:
    """Training, held-out and test texts as rows of ``LENGTH + 1`` tokens, split by text."""
    texts = load_texts()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    tenth = len(texts) // 10
    parts = order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((texts[i] for i in parts[0]), trainer)
    rows = []
    for part in parts:
        tokens = torch.tensor([t for i in part for t in tokenizer.encode(texts[i]).ids])
        rows.append(tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))
    return rows


def make_model() -> HiddenStateExits:
    """Six layers, exits after the second, fourth and sixth, each with a norm of its own."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS[-1],
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return HiddenStateExits(LlamaModel(config), LAYERS, [nn.RMSNorm(WIDTH) for _ in LAYERS])


def head_of(model: HiddenStateExits) -> Tensor:
    """The vocabulary head [V, D] that all exits share: it is the embedding."""
    backbone: Any = model.backbone
    weight: Tensor = backbone.get_input_embeddings().weight
    return weight


def layerskip_weights() -> Tensor:
    """e(l) of each exit [K], mean 1: the sum of the layers up to l; of the last one, and all."""
    last = LAYERS[-1] - 1
    scales = [sum(range(layer)) for layer in LAYERS[:-1]] + [last + sum(range(last))]
    weights = torch.tensor(scales, dtype=torch.float32)
    return weights / weights.mean()


def batches(rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and next tokens [size, T], in random order, without an incomplete batch."""
    for chosen in torch.randperm(len(rows)).split(size):
        if len(chosen) == size:
            yield rows[chosen, :-1], rows[chosen, 1:]


def train(
    model: HiddenStateExits,
    rows: Tensor,
    arm: str,
    settings: argparse.Namespace,
    log: Log,
    advance: Callable[[], None],
) -> None:
    """Train by one arm; each batch makes two steps, one of each half."""
    torch.manual_seed(settings.seed)  # the same batches for all
    num_steps = settings.epochs * (len(rows) // settings.batch_size) * 2
    optimizer = AdamW(model.parameters(), lr=settings.lr, weight_decay=0.1)
    scheduler = OneCycleLR(optimizer, settings.lr, num_steps, pct_start=0.1, cycle_momentum=False)
    loss = partial(exit_losses, model)
    with torch.random.fork_rng():
        reweighter = SampleReweighter(len(LAYERS))
    step = MetaReweightStep(
        model,
        optimizer,
        reweighter,
        reweighter_optimizer=Adam(reweighter.parameters(), settings.reweighter_lr),
        loss=loss,
        interval=settings.interval,
    )
    fixed = layerskip_weights() if arm == "LayerSkip" else torch.ones(len(LAYERS))
    for number in range(num_steps):
        if number % (num_steps // settings.epochs) == 0:
            halves = iter(swap_halves(batches(rows, settings.batch_size)))
        half, other = next(halves)
        optimizer.zero_grad()
        if arm == "reweighted":
            scalars = step.backward(half, other).scalars()
        else:
            inputs, target = half
            losses = loss(model(inputs), target).losses.mean(0)
            (fixed * losses).sum().backward()
            scalars = {f"loss/exit_{k}": each for k, each in enumerate(losses.detach(), 1)}
        optimizer.step()
        scheduler.step()
        if number % 10 == 0:
            log({name: scalar.item() for name, scalar in scalars.items()}, number)
        advance()


def exit_losses(model: HiddenStateExits, hidden: list[Tensor], target: Tensor) -> ExitLosses:
    """The losses of every token at every exit, never with all logits in memory."""
    return linear_exit_cross_entropy(hidden, head_of(model), target)


@torch.no_grad()
def evaluate(model: HiddenStateExits, rows: Tensor) -> ExitLosses:
    """Every exit on every token [N, K]."""
    model.eval()
    parts = [exit_losses(model, model(some[:, :-1]), some[:, 1:]) for some in rows.split(64)]
    return ExitLosses.cat(parts)


def measure(model: HiddenStateExits, held_out: Tensor, test: Tensor) -> dict[str, float]:
    """Perplexity of each exit, next-token accuracy, and both with exits chosen by confidence."""
    calibration, found = evaluate(model, held_out), evaluate(model, test)
    assert calibration.confidence is not None
    assert found.confidence is not None
    costs = exit_costs(
        model,
        test[:1, :-1],
        lambda hidden: [nn.functional.linear(state, head_of(model)) for state in hidden],
    )
    points = budgeted_curve(calibration, found, costs)
    shares = exit_shares(len(LAYERS), 1.0)
    exits = choose_exits(found.confidence, find_thresholds(calibration.confidence, shares))
    chosen = found.losses.gather(1, exits.unsqueeze(1))
    row = {f"perplexity {k}": x.exp().item() for k, x in enumerate(found.losses.mean(0), 1)}
    row |= {f"accuracy {k}": 100 * x.item() for k, x in enumerate(anytime_accuracy(found), 1)}
    row["perplexity, a third at each exit"] = chosen.mean().exp().item()
    row["accuracy within a budget"] = 100 * sum(p.accuracy for p in points) / len(points)
    return row


def make_logger(kind: str, folder: Path, name: str) -> Log:
    """What takes the scalars of a step: nothing, TensorBoard, or Trackio."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / name))

        def log(scalars: dict[str, Any], step: int) -> None:
            for key, value in scalars.items():
                writer.add_scalar(key, value, step)

        return log
    if kind == "trackio":
        import trackio

        run = trackio.init(project="reweight-language-model", name=name)
        return lambda scalars, step: run.log(scalars, step=step)
    return lambda scalars, step: None


def main(arguments: list[str] | None = None) -> None:
    """Train every arm with each seed, add a row for each to the CSV, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="of split, first parameters and order")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=32, help="rows of 64 tokens; a step trains on one half")
    add("--lr", type=float, default=2e-3)
    add("--reweighter-lr", type=float, default=1e-3)
    add("--interval", type=int, default=10, help="steps from one reweighter update to the next")
    add("--max-rows", type=int, help="of each part; default: all")
    add("--logger", choices=("none", "tensorboard", "trackio"), default="none")
    add("--out", type=Path, default=Path("runs", "language_model"), help="folder of the CSV")
    settings = parser.parse_args(arguments)
    settings.out.mkdir(parents=True, exist_ok=True)
    path, rows = settings.out / "results.csv", []
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for seed, arm in product(settings.seeds, ARMS):
            settings.seed = seed
            training, held_out, test = (part[: settings.max_rows] for part in load_tokens(seed))
            torch.manual_seed(seed)
            model = make_model().train()
            log = make_logger(settings.logger, settings.out, f"{arm}-{seed}")
            task = progress.add_task(
                f"{arm}, seed {seed}",
                total=settings.epochs * (len(training) // settings.batch_size) * 2,
            )
            start = time.process_time()
            train(model, training, arm, settings, log, partial(progress.advance, task))
            seconds = round(time.process_time() - start)
            row = {"arm": arm, "seed": seed, "seconds": seconds}
            rows.append(row | measure(model, held_out, test))
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    console.print(as_table(rows), f"written to {path}")


def as_table(rows: list[dict[str, Any]]) -> Table:
    """The mean over the seeds of each column and arm."""
    table = Table(title="mean over the seeds", box=None)
    for heading in ("", *ARMS):
        table.add_column(heading, justify="right" if heading else "left")
    for name in list(rows[0])[2:]:
        means = [[row[name] for row in rows if row["arm"] == arm] for arm in ARMS]
        table.add_row(name, *(f"{math.fsum(each) / len(each):.2f}" for each in means))
    return table


if __name__ == "__main__":
    main()
