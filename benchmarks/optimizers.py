"""Every optimizer that can be had: is its look-ahead its own next step, and the derivative right?

Each class of the packages below is built twice and taken through the same steps with gradients
drawn at random, in float32: once θ̂ comes from ``pseudo_update``, once from the class's own next
step. Then in float64: ⟨c, ∂θ̂/∂g·u⟩ for c and u drawn at random, once by the derivative and once by
central differences of the class's own step, of classes built anew for each point.

    pip install pytorch_optimizer timm torchvision torch-optimizer schedulefree torchao ...
    python benchmarks/optimizers.py                     # ten minutes on two cores
    python benchmarks/optimizers.py torch.optim         # these packages only, nothing written
    python benchmarks/optimizers.py torch.optim --cost  # what they cost, five minutes

Packages that are not installed are left out and named. Prints a table and a summary; without
arguments it writes them to ``results/optimizers.csv``. With ``--cost`` it times instead: θ̂ and the
way back over the class's own step, by processor time, for 60 tensors of at most 256 entries and for
8 million entries in 16 tensors. Where there is a rule for a class, a subclass that adds nothing is
timed as well: there is none for it, so its step is recorded. It writes
``results/optimizer_costs.csv``.
"""

import argparse
import copy
import csv
import importlib
import importlib.metadata
import itertools
import logging
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim

from reweight._optimizers.accepted import check_differentiable
from reweight._optimizers.own_step import Widened
from reweight._optimizers.pseudo_update import pseudo_update
from reweight._optimizers.rules import RULES

RESULTS = Path(__file__).parent / "results" / "optimizers.csv"
COSTS = RESULTS.with_name("optimizer_costs.csv")
PACKAGES = {  # module: distribution
    "torch.optim": "torch",
    "pytorch_optimizer": "pytorch_optimizer",
    "timm.optim": "timm",
    "torch_optimizer": "torch-optimizer",
    "schedulefree": "schedulefree",
    "torchao.optim": "torchao",
    "Atiny": "Atiny",
    "adabelief_pytorch": "adabelief-pytorch",
    "adam_mini": "adam-mini",
    "adan_pytorch": "adan-pytorch",
    "apollo_torch": "apollo-torch",
    "came_pytorch": "came-pytorch",
    "core_optimizer": "core-optimizer",
    "dadaptation": "dadaptation",
    "dctadam": "dctadam",
    "dowg": "dowg",
    "fsgdm": "fsgdm",
    "galore_torch": "galore-torch",
    "grokadamw": "grokadamw",
    "kron_torch": "kron-torch",
    "lion_pytorch": "lion-pytorch",
    "madgrad": "madgrad",
    "muon": "muon-optimizer",
    "nadir": "nadir",
    "open_lars": "open-lars",
    "parameterfree": "parameterfree",
    "prodigyopt": "prodigyopt",
    "pytorch_ranger": "pytorch-ranger",
}
Build = Callable[[type[optim.Optimizer], nn.Module], optim.Optimizer]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim != 2]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": matrices(model)}, {"params": vectors(model), "lr": 0.02}]


def muon_groups(model: nn.Module, flag: str = "use_muon") -> list[dict[str, Any]]:
    return [
        {"params": matrices(model), flag: True, "lr": 0.02},
        {"params": vectors(model), flag: False, "lr": 0.003},
    ]


BUILDS: list[Build] = [  # the first that works is taken
    lambda kind, model: kind(two_groups(model), lr=0.01, momentum_dtype=torch.float32),
    lambda kind, model: kind(two_groups(model), lr=0.01),
    lambda kind, model: kind(two_groups(model)),
    lambda kind, model: kind(model.parameters(), lr=0.01),
    lambda kind, model: kind(model.parameters()),
    lambda kind, model: kind(matrices(model), lr=0.01),
    lambda kind, model: kind(matrices(model)),
    lambda kind, model: kind(muon_groups(model)),
    lambda kind, model: kind(model, lr=0.01),
    lambda kind, model: kind(optim.AdamW(two_groups(model), lr=0.01)),
    lambda kind, model: kind(model.parameters(), base_optimizer=optim.SGD, lr=0.01),
    lambda kind, model: kind(model.named_parameters(), lr=0.01),
    lambda kind, model: kind(
        model.parameters(), lr=0.01, num_iterations=100, num_epochs=1, num_batches_per_epoch=100
    ),
]
NUM_WARM = 13  # steps before the one that is looked ahead to; some begin otherwise


class Training(NamedTuple):
    """A model and its optimizer, after some steps."""

    model: nn.Module
    optimizer: optim.Optimizer
    gradients: list[Tensor]


class Row(NamedTuple):
    """What came of a class."""

    package: str
    version: str
    optimizer: str
    outcome: str
    theta_error: str = ""
    v_error: str = ""
    reason: str = ""


def trained(
    kind: type[optim.Optimizer],
    build: Build,
    dtype: torch.dtype,
    num_warm: int = NUM_WARM,
    widths: Sequence[int] = (4, 6, 8),
) -> Training:
    """The same whenever it is called."""
    torch.manual_seed(0)
    model = nn.Sequential(*itertools.starmap(nn.Linear, itertools.pairwise(widths))).to(dtype)
    optimizer = build(kind, model)
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    generator = torch.Generator().manual_seed(1)

    def gradients() -> list[Tensor]:
        return [
            0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            for p in model.parameters()
        ]

    for _ in range(num_warm):
        for p, g in zip(model.parameters(), gradients(), strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()
    return Training(model, optimizer, gradients())


def own_next(training: Training, gradients: list[Tensor]) -> list[Tensor]:
    """θ after the class's own step; the model has moved then."""
    for p, g in zip(training.model.parameters(), gradients, strict=True):
        p.grad = g.clone()
    torch.manual_seed(7)
    training.optimizer.step()
    return [p.detach() for p in training.model.parameters()]


def ahead(training: Training) -> tuple[list[Tensor], list[Tensor]]:
    """θ̂, and the gradients that it depends on."""
    named = dict(training.model.named_parameters())
    leaves = {n: g.clone().requires_grad_() for n, g in zip(named, training.gradients, strict=True)}
    torch.manual_seed(7)
    check_differentiable(training.optimizer)
    update = pseudo_update([training.optimizer], named, leaves)
    return list(update.parameters.values()), list(leaves.values())


class Heard(logging.Handler):
    """What the package has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.messages.append(record.getMessage())


def derivative_error(
    kind: type[optim.Optimizer], build: Build, dtype: torch.dtype
) -> tuple[float, float]:
    """Of the derivative along one direction, relative to the quotient; and of the quotient."""
    wide = Widened(torch.float64) if dtype is torch.float64 else None
    training = trained(kind, build, dtype)
    moved, leaves = ahead(training)
    generator = torch.Generator().manual_seed(2)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(dtype)

    parameters = list(training.model.parameters())
    c = [
        drawn(m) / ((m.detach() - p.detach()).norm().item() or 1)
        for m, p in zip(moved, parameters, strict=True)
    ]
    u = [drawn(g) * g.detach().abs() for g in leaves]
    value = sum((a * m).sum() for a, m in zip(c, moved, strict=True))
    v = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    slope = sum((a * b).sum().item() for a, b in zip(v, u, strict=True))

    def at(h: float) -> float:
        other = trained(kind, build, dtype)
        gradients = [g + h * d for g, d in zip(other.gradients, u, strict=True)]
        with wide or nullcontext():
            new = own_next(other, gradients)
        return sum(
            (a * (n - m.detach())).sum().item() for a, n, m in zip(c, new, moved, strict=True)
        )

    steps = (1e-3, 1e-4, 1e-5, 1e-6) if dtype is torch.float64 else (1e-1, 3e-2, 1e-2)
    quotients = [(at(h) - at(-h)) / (2 * h) for h in steps]
    scale = max(abs(quotients[0]), 1e-6)
    rounding = min(abs(quotients[0] - quotients[1]) / scale, 0.02)  # of the quotients themselves
    return min(abs(slope - q) for q in quotients) / scale, rounding


class Cost(NamedTuple):
    """θ̂ and its derivative over the class's own step: by rule, recorded, the same with foreach."""

    optimizer: str
    size: str
    by_rule: str
    recorded: str
    recorded_foreach: str


SIZES = {"60 small tensors": [16] * 31, "8 million entries": [1024] * 9}
SLOW = 5.0  # seconds: a step that takes longer is not timed, nor again once as many have gone by


def cost(kind: type[optim.Optimizer], build: Build, widths: Sequence[int]) -> str:
    """The median of six ratios, in turns; of fewer where they take long."""
    training = trained(kind, build, torch.float32, 3, widths)
    try:
        ahead(training)  # which verifies it
    except TypeError as refusal:
        return outcome_of_refusal(reason_in(str(refusal)))
    given = [torch.ones_like(p) for p in training.model.parameters()]
    ratios = []
    begin = time.process_time()
    while len(ratios) < 6 and (len(ratios) < 2 or time.process_time() - begin < SLOW):
        start = time.process_time()
        moved, leaves = ahead(training)
        moves = [m.requires_grad for m in moved]  # Muon takes matrices alone
        outputs, cotangents = (list(itertools.compress(each, moves)) for each in (moved, given))
        torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        middle = time.process_time()
        own_next(training, training.gradients)
        own = time.process_time() - middle
        if own > SLOW:
            return f"own step takes {own:.0f} s"
        ratios.append((middle - start) / own)
    return f"{statistics.median(ratios):.1f}"


def costs(kind: type[optim.Optimizer]) -> Iterator[Cost]:
    """Of a class, and of a subclass, which no rule is for."""
    subclass = type(kind.__name__, (kind,), {})
    for build in BUILDS:
        try:
            usual = trained(kind, build, torch.float32).optimizer
            ahead(trained(kind, build, torch.float32))
        except Exception:
            continue

        def with_options(build: Build = build, **options: Any) -> Build:
            def built(kind: type[optim.Optimizer], model: nn.Module) -> optim.Optimizer:
                optimizer = build(kind, model)
                for group in optimizer.param_groups:
                    group.update(options)
                return optimizer

            return built

        names: dict[str, dict[str, Any]] = {kind.__name__: {}}
        if "amsgrad" in usual.defaults:
            names[f"{kind.__name__}, AMSGrad"] = {"amsgrad": True}
        for (name, options), (size, widths) in itertools.product(names.items(), SIZES.items()):
            ratios = [cost(kind, build, widths) if kind in RULES and not options else ""]
            ratios.append(cost(subclass, with_options(**options), widths))
            has_foreach = "foreach" in usual.defaults
            by_foreach = with_options(**options, foreach=True)
            ratios.append(cost(subclass, by_foreach, widths) if has_foreach else "")
            yield Cost(name, size, *ratios)
        return


def reason_in(message: str) -> str:
    return message.partition(": ")[2].partition(". Pass")[0].splitlines()[0][:160]


def outcome_of_refusal(reason: str) -> str:
    for word, outcome in {
        "closure": "refused: needs a closure",
        "does not depend": "refused: does nothing without a closure",
        "signs of": "refused: has no derivative",
        "not an operation of PyTorch": "refused: own kernels",
        "tensors of the class": "refused: own kernels",
        "memory itself": "refused: reads memory",
        "bits": "refused: stochastic rounding by bits",
        "does not require grad": "refused: needs second derivatives of the loss",
    }.items():
        if word in reason:
            return outcome
    return "refused: verification"


def examined(package: str, kind: type[optim.Optimizer]) -> Row:
    """One class."""
    start = package, importlib.metadata.version(PACKAGES[package]), kind.__name__
    error: BaseException = RuntimeError("no way to build it")
    for build in BUILDS:
        try:
            own_next(training := trained(kind, build, torch.float32), training.gradients)
        except BaseException as failure:
            if isinstance(failure, KeyboardInterrupt):
                raise
            words = str(failure).lower()
            if not isinstance(failure, TypeError) or "closure" in words:
                error = failure
            if "closure" in words or "require grad" in words:
                break
        else:
            return measured(start, kind, build)
    message = f"{type(error).__name__}: {error}"
    for word, outcome in {
        "closure": "refused: needs a closure",
        "require grad": "refused: needs second derivatives of the loss",
        "create_graph": "refused: needs second derivatives of the loss",
        "dense gradients": "refused: takes sparse gradients alone",
    }.items():
        if word in message.lower():
            return Row(*start, outcome, reason=message.splitlines()[0][:160])
    return Row(*start, "not built here", reason=message.splitlines()[0][:160])


def measured(start: tuple[str, str, str], kind: type[optim.Optimizer], build: Build) -> Row:
    """A class that can be built so."""
    heard = Heard()
    logging.getLogger("reweight").addHandler(heard)
    try:
        training = trained(kind, build, torch.float32)
        before = copy.deepcopy((training.optimizer.state, training.optimizer.param_groups))
        versions = [p._version for p in training.model.parameters()]
        moved, _ = ahead(training)
        same = same_tree(before, (training.optimizer.state, training.optimizer.param_groups))
        if not same or versions != [p._version for p in training.model.parameters()]:
            return Row(*start, "WRONG: the optimizer has changed")
        old = [p.detach().clone() for p in training.model.parameters()]
        new = own_next(trained(kind, build, torch.float32), training.gradients)
        off = max((a - b).abs().max().item() for a, b in zip(moved, new, strict=True))
        step = max((a - b).abs().max().item() for a, b in zip(old, new, strict=True))
        theta = "0" if off == 0 else f"{off / max(step, 1e-30):.1e}"
        torch.set_default_dtype(torch.float64)
        try:
            (error, rounding), precision = derivative_error(kind, build, torch.float64), ""
        except Exception:
            torch.set_default_dtype(torch.float32)
            (error, rounding) = derivative_error(kind, build, torch.float32)
            precision = " (float32)"
    except TypeError as refusal:
        if "`optimizer` must" not in str(refusal):
            raise
        reason = reason_in(str(refusal))
        return Row(*start, outcome_of_refusal(reason), reason=reason)
    finally:
        torch.set_default_dtype(torch.float32)
        logging.getLogger("reweight").removeHandler(heard)
    said = any("numbers out of tensors" in message for message in heard.messages)
    close = error < (0.05 if precision else 1e-3) + rounding and off <= 1e-2 * step
    outcome = "exact" if close else "exact but for numbers, as logged" if said else "WRONG"
    return Row(*start, outcome, theta, f"{error:.0e}{precision}")


def same_tree(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) or bool(((a == b) | (a != a)).all())
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same_tree, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return bool(a == b) if isinstance(a, int | float | str | None) else True


def classes(package: str) -> Iterator[type[optim.Optimizer]]:
    """Those that a package offers, each once."""
    module, seen = importlib.import_module(package), set()
    for name in sorted(vars(module)):
        value = getattr(module, name)
        if not isinstance(value, type) or not issubclass(value, optim.Optimizer) or value in seen:
            continue
        if package != "torch.optim" and value.__module__.startswith("torch.optim"):
            continue
        seen.add(value)
        if value is not optim.Optimizer and not name.startswith("Base"):
            yield value


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=list(PACKAGES))
    parser.add_argument("--cost", action="store_true", help="time it")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("reweight").propagate = False
    torch.compiler.set_stance("force_eager")  # compiled, a step rounds and draws otherwise
    if asked.cost:
        table = []
        for package, kind in ((one, kind) for one in asked.packages for kind in classes(one)):
            timed = len(table)
            for row in costs(kind):
                print(*row, sep=" | ", flush=True)
                table.append(row)
            if timed == len(table):
                print(kind.__name__, examined(package, kind).outcome, sep=" | ", flush=True)
        write(COSTS, Cost._fields, table)
        return
    rows: list[Row] = []
    for package in asked.packages:
        try:
            found = list(classes(package))
        except ImportError as error:
            print(f"{package}: not installed ({error})")
            continue
        for kind in found:
            try:
                row = examined(package, kind)
            except Exception as error:
                start = package, importlib.metadata.version(PACKAGES[package]), kind.__name__
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                row = Row(*start, "RAW ERROR", reason=message[:160])
            rows.append(row)
            print(*row[:1], *row[2:], sep=" | ", flush=True)
    for outcome, number in Counter(row.outcome for row in rows).most_common():
        print(f"{number:4} {outcome}")
    if asked.packages == list(PACKAGES):
        write(RESULTS, Row._fields, rows)


if __name__ == "__main__":
    main()
