"""The steps that the benchmarks compare."""

from collections.abc import Callable
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Adam, Optimizer

from nets import NETS, OPTIMIZERS, Batch, Net
from peers import PEERS, Build, Step
from reweight import (
    BudgetedObjective,
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
)

# Options of the step, and three of the benchmark: the share of the meta batch that is given (at 0
# the next train batch serves), moves="half", the later half of the parameters, and updates=False,
# for a step as it is between updates.
MODES: dict[str, dict[str, object]] = {
    "forward": {"estimator": "forward"},
    "lean": {"estimator": "forward", "lean": True},
    "interval 10": {"estimator": "forward", "interval": 10},
    "interval 10, lean": {"estimator": "forward", "interval": 10, "lean": True},
    "between updates": {"updates": False},
    "lagged": {"estimator": "forward", "lagged": True},
    "a quarter of the rows": {"estimator": "forward", "train_fraction": 0.25},
    "a quarter of both batches": {"estimator": "forward", "train_fraction": 0.25, "meta": 0.25},
    "lagged, next batch as meta": {"estimator": "forward", "lagged": True, "meta": 0},
    "same, a quarter of rows": {
        "estimator": "forward",
        "lagged": True,
        "meta": 0,
        "train_fraction": 0.25,
    },
    "half of the parameters move": {"estimator": "forward", "moves": "half"},
    "finite differences": {"estimator": "finite_difference"},
    "unrolled": {"estimator": "unrolled"},
}
UNSUPPORTED = {("higher", "adamw"), ("by hand", "adamw")}


def plain(
    model: nn.Module, optimizer: Optimizer, g: SampleReweighter, g_optimizer: Optimizer
) -> Step:
    """Conventional training of all exits, as one writes it without this library."""

    def step(train: Batch, meta: Batch) -> None:
        optimizer.zero_grad()
        target = train[1].flatten()
        losses = [F.cross_entropy(logits.flatten(0, -2), target) for logits in model(train[0])]
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def ours(
    model: nn.Module,
    optimizer: Optimizer,
    g: SampleReweighter,
    g_optimizer: Optimizer,
    meta: float = 1,
    moves: str | None = None,
    updates: bool = True,
    **options: object,
) -> Step:
    g.requires_grad_(updates)
    if moves == "half":
        options["moves"] = set(later_half(model)).__contains__
    step = MetaReweightStep(model, optimizer, g, reweighter_optimizer=g_optimizer, **options)

    def run(train: Batch, batch: Batch) -> None:
        size = round(meta * len(batch[1]))
        step(train, (batch[0][:size], batch[1][:size]) if size else None)

    return run


def by_hand(
    model: nn.Module, optimizer: Optimizer, g: SampleReweighter, g_optimizer: Optimizer
) -> Step:
    """Our exact step for momentum SGD with nothing around it: nothing checked, replayed, put back.

    What a step costs at least in Python. It is right for models without buffers and randomness.
    """
    named = dict(model.named_parameters())
    parameters, group = list(named.values()), optimizer.param_groups[0]
    of_g = list(g.parameters())

    def step(train: Batch, meta: Batch) -> None:
        optimizer.zero_grad()
        losses = exit_cross_entropy(model(train[0]), train[1])
        shares = losses.sample_shares()
        weights = g(losses)
        gradients = torch.autograd.grad(
            losses.losses, parameters, shares * weights.detach(), retain_graph=True
        )
        with torch.no_grad():
            values = [p.detach() for p in parameters]
            descents = torch._foreach_add(gradients, values, alpha=group["weight_decay"])
            buffers = [optimizer.state[p].get("momentum_buffer") for p in parameters]
            if all(buffer is not None for buffer in buffers):
                torch._foreach_add_(descents, buffers, alpha=group["momentum"])
            moved = torch._foreach_add(values, descents, alpha=-group["lr"])
        moved = [each.requires_grad_() for each in moved]
        logits = functional_call(model, dict(zip(named, moved, strict=True)), (meta[0],))
        meta_loss = BudgetedObjective()(exit_cross_entropy(logits, meta[1])).value
        tangents = torch._foreach_mul(torch.autograd.grad(meta_loss, moved), -group["lr"])
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            pairs = zip(named, values, tangents, strict=True)
            duals = {name: forward_ad.make_dual(value, v) for name, value, v in pairs}
            again = exit_cross_entropy(functional_call(model, duals, (train[0],)), train[1])
            slopes = forward_ad.unpack_dual(again.losses).tangent
        found = torch.autograd.grad(weights, of_g, shares * slopes)
        for parameter, gradient in zip(of_g, found, strict=True):
            parameter.grad = gradient
        g_optimizer.step()
        with torch.no_grad():
            weights = g(losses)
        losses.losses.backward(shares * weights)
        optimizer.step()

    return step


def later_half(model: nn.Module) -> list[str]:
    """Names of the last parameters, in the order of the model, that hold half of all entries."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    names, held = [], 0
    while held < sum(sizes.values()) / 2:
        names.append(list(sizes)[-1 - len(names)])
        held += sizes[names[-1]]
    return names


CONTESTANTS: dict[str, Build] = {
    "plain": plain,
    "by hand": by_hand,
    **{f"ours, {mode}": partial(ours, **options) for mode, options in MODES.items()},
    **PEERS,
}


def contestant(net: str | Net, optimizer_name: str, name: str) -> tuple[Callable[[], object], int]:
    """A step to call, and how many calls make one round of it.

    Args:
        net: one, or its name.
        optimizer_name: one of ``OPTIMIZERS``.
        name: one of ``CONTESTANTS``.
    """
    torch.manual_seed(0)
    net = NETS[net] if isinstance(net, str) else net
    model = net.build()
    g = SampleReweighter(net.num_exits)
    g_optimizer = Adam(g.parameters(), lr=1e-4, weight_decay=1e-4)
    step = CONTESTANTS[name](model, OPTIMIZERS[optimizer_name](model), g, g_optimizer)
    num_steps = net.num_steps * (10 if "interval 10" in name else 1)
    return partial(step, net.batch(), net.batch()), num_steps
