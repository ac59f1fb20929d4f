"""Slow and obvious twins of what the package computes fast, sharing no code with it."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cases import Batch


def allot_slowly(confidence: Tensor, shares: list[float], valid: list[bool]) -> list[int | None]:
    """The exit of each sample: one exit after the other picks its most confident ones by hand."""
    free = [i for i, counts in enumerate(valid) if counts]
    num_valid, num_exits = len(free), confidence.shape[1]
    exits: list[int | None] = [None] * len(valid)
    for k in range(num_exits):
        quota = len(free) if k == num_exits - 1 else math.floor(num_valid * shares[k] + 1e-9)
        for _ in range(quota):
            best = max(free, key=lambda i: (confidence[i, k].item(), -i))
            exits[best] = k
            free.remove(best)
    return exits


def thresholds_slowly(confidence: Tensor, shares: list[float]) -> list[float]:
    """Every distinct confidence is tried as the threshold of every exit."""
    num_samples, num_exits = confidence.shape
    left = [row.tolist() for row in confidence]
    thresholds = []
    for k in range(num_exits - 1):
        planned = math.floor(num_samples * shares[k] + 1e-9)
        fair = math.floor(len(left) * shares[k] / sum(shares[k:]) + 1e-9)
        quota = min(planned, fair)
        values = sorted({row[k] for row in left}, reverse=True)
        # Candidates that take at least the quota, the smallest such number first.
        chosen = math.inf
        if quota:
            counts = {value: sum(row[k] >= value for row in left) for value in values}
            chosen = next(value for value in values if counts[value] >= quota)
            above = [value for value in values if value > chosen]
            num_above = counts[above[-1]] if above else 0
            if counts[chosen] == len(left) and quota - num_above <= counts[chosen] - quota:
                chosen = above[-1] if above else math.inf
        thresholds.append(chosen)
        left = [row for row in left if row[k] < chosen]
    return [*thresholds, -math.inf]


def budgeted_loss_slowly(logits: list[Tensor], target: Tensor, power: float) -> Tensor:
    """Σ_k mean over the samples allotted to exit k, sample by sample."""
    num_exits, num_samples = len(logits), len(target)
    shares = [power**k for k in range(num_exits)]
    shares = [share / sum(shares) for share in shares]
    confidence = torch.stack([z.softmax(1).max(1).values for z in logits], 1)
    exits = allot_slowly(confidence, shares, [True] * num_samples)
    total = logits[0].new_zeros(())
    for k in range(num_exits):
        members = [j for j in range(num_samples) if exits[j] == k]
        if members:
            losses = [F.cross_entropy(logits[k][j : j + 1], target[j : j + 1]) for j in members]
            total = total + sum(losses) / len(members)
    return total


def direct_weights_slowly(hypergradient: Tensor, valid: list[bool]) -> Tensor:
    """L2RW's, exit by exit; where few samples have all the weight, by the square-root rule."""
    weights = torch.ones_like(hypergradient)
    for k in range(hypergradient.shape[1]):
        known = [i for i in range(len(valid)) if valid[i] and hypergradient[i, k] != 0]
        helpful = {i: max(0.0, -hypergradient[i, k].item()) for i in known}
        total = sum(helpful.values())
        for i in known:
            weights[i, k] = helpful[i] * len(known) / total if total else 0.0
        if total:
            effective = total**2 / sum(p**2 for p in helpful.values())
            weights[known, k] *= min(1, math.sqrt(effective / (len(known) / 4)))
    return weights


def meta_objective(
    model: nn.Module,
    optimizer: Optimizer,
    reweighter: nn.Module,
    train: Batch,
    meta: Batch,
    meta_loss: Callable[[list[Tensor], Tensor], Tensor],
) -> float:
    """L_meta after one real ``optimizer.step()`` on a copy: what the meta step descends on."""
    model, optimizer = copy_together(model, optimizer)
    random_state = torch.get_rng_state()
    optimizer.zero_grad()
    logits = model(train[0])
    losses = torch.stack([F.cross_entropy(z, train[1], reduction="none") for z in logits], 1)
    weights = reweighter(losses.detach()).detach()
    (weights * losses).mean(0).sum().backward()
    optimizer.step()
    with torch.no_grad():
        value = meta_loss(model(meta[0]), meta[1]).item()
    torch.set_rng_state(random_state)
    return value


def stock_hypergradient(
    model: nn.Module,
    optimizer: Optimizer,
    weights: Tensor,
    train: Batch,
    meta: Batch,
    meta_loss: Callable[[list[Tensor], Tensor], Tensor],
) -> Tensor:
    """∂L_meta/∂w by double backward through the stock class with ``differentiable=True``."""
    names = [name for name, _ in model.named_parameters()]
    leaves = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    logits = torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), (train[0],))
    losses = torch.stack([F.cross_entropy(z, train[1], reduction="none") for z in logits], 1)
    weights = weights.detach().requires_grad_()
    gradients = torch.autograd.grad(
        (weights * losses).mean(0).sum(), leaves, create_graph=True, allow_unused=True
    )
    moving = [leaf.clone() for leaf in leaves]
    moved = {id(p): clone for p, clone in zip(model.parameters(), moving, strict=True)}
    groups = [
        {**group, "params": [moved[id(p)] for p in group["params"]], "differentiable": True}
        for group in optimizer.param_groups
    ]
    for group in groups:
        group.update(foreach=False, **({"fused": False} if "fused" in group else {}))
    stock = type(optimizer)(groups, differentiable=True)
    for parameter, state in optimizer.state.items():
        state = copy.deepcopy(state)
        if "step" in state:  # kept in float32 by fused optimizers, which would round β**step to it
            state["step"] = state["step"].double()
        stock.state[moved[id(parameter)]] = state
    for clone, gradient in zip(moving, gradients, strict=True):
        clone.grad = gradient
    stock.step()
    logits = torch.func.functional_call(model, dict(zip(names, moving, strict=True)), (meta[0],))
    return torch.autograd.grad(meta_loss(logits, meta[1]), weights)[0]


def copy_together(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Copies of both, the optimizer's copy holding the parameters of the model's copy."""
    return copy.deepcopy((model, optimizer))


def numerical_slopes(
    function: Callable[[], float], parameters: list[Tensor], num_directions: int = 2
) -> tuple[Tensor, Tensor]:
    """Random directions [D, P] of all parameters at once, and the slopes [D] along them.

    By central differences, at a distance of 1e-4. A gradient that is wrong in any of its entries
    has another product with a random direction, by about as much as it is off.
    """
    generator = torch.Generator().manual_seed(0)
    start = nn.utils.parameters_to_vector(parameters).detach()
    shape = (num_directions, len(start))
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    slopes = []
    for direction in directions:
        step = 1e-4 / direction.norm()
        values = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * direction, parameters)
            values.append(function())
        slopes.append((values[0] - values[1]) / (2 * step))
    nn.utils.vector_to_parameters(start, parameters)
    return directions, torch.stack(slopes)
