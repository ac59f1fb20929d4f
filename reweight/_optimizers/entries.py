"""Steps that work entry by entry: small parameters go through them as one."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, optim

from reweight._optimizers.rules import RULES, Count, Group, Moments, Step
from reweight._ranks.collectives import local
from reweight._ranks.shards import shard_like


def by_rule(
    optimizer: optim.Optimizer, group: Group, parameters: list[Tensor], gradients: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """One group, shard by shard."""
    states = [optimizer.state.get(p, {}) for p in parameters]
    found: list[Any] = [None] * len(parameters)
    num_zero = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
    for members in together(parameters, states):
        chosen = [local(parameters[i]) for i in members]
        new, slope = _moved(
            optimizer,
            group,
            joined(chosen),
            joined([local(gradients[i].detach()) for i in members]),
            {
                name: joined([local(states[i][name]) for i in members])
                for name, value in states[members[0]].items()
                if name != "step" and isinstance(value, Tensor)
            },
            _count(states[members[0]]),
        )
        slopes: Sequence[Tensor | float] = [slope] * len(members)
        if isinstance(slope, Tensor) and slope.shape == new.shape:
            num_zero += cut(slope)
            slopes = parted(slope, chosen)
        for i, value, slope in zip(members, parted(new, chosen), slopes, strict=True):
            found[i] = [shard_like(gradients[i], part) for part in (value, slope)]
    values, slopes = zip(*found, strict=True)
    return moved(gradients, values, slopes), num_zero


def cut(slope: Tensor) -> Tensor:
    """Let what is not finite be 0, in place; how many entries that is."""
    if slope.device.type == "cpu" and math.isfinite(slope.sum()):  # as usual; no device to wait for
        return slope.new_zeros((), dtype=torch.int64)
    number = torch.count_nonzero(slope - slope)  # NaN where it is not finite
    slope.nan_to_num_(0, 0, 0)
    return number


def moved(
    gradients: Sequence[Tensor], values: Sequence[Tensor], slopes: Sequence[Tensor | float]
) -> list[Tensor]:
    """θ̂ as a function of the gradients, with those slopes."""
    return list(_Moved.apply(slopes, *gradients, *values))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _moved(
    optimizer: optim.Optimizer, group: Group, p: Tensor, g: Tensor, moments: Moments, count: Count
) -> Step:
    """θ̂ = θ − α·s, and its slope ∂θ̂/∂g."""
    lr, decay = group["lr"], group.get("weight_decay", 0)
    decoupled = _is_decoupled(optimizer, group)
    d = _descent(group, p, g, 0 if decoupled else decay)
    start = p * (1 - lr * decay) if decoupled and decay else p
    step, slope = RULES[type(optimizer)](group, moments, count, d)
    moved = start - lr * step if isinstance(lr, Tensor) else start.sub(step, alpha=lr)
    return moved.to(p.dtype), slope * (lr if group.get("maximize") else -lr)


class _Moved(torch.autograd.Function):
    """θ̂ as a function of the gradients, entry by entry, when it is known with its slopes."""

    @staticmethod
    def forward(ctx: Any, slopes: Sequence[Tensor | float], *tensors: Tensor) -> Any:
        ctx.slopes = slopes
        ctx.set_materialize_grads(False)
        return tensors[len(slopes) :]  # after as many gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs, rest = list(zip(cotangents, ctx.slopes, strict=True)), [None] * len(cotangents)
        there = [c for c in cotangents if c is not None]
        numbers = all(isinstance(slope, float) for slope in ctx.slopes)
        if len(there) == len(pairs) and (numbers or all(map(_is_like, ctx.slopes, there))):
            return None, *torch._foreach_mul(there, ctx.slopes), *rest
        return None, *(None if c is None else (c * slope).to(c.dtype) for c, slope in pairs), *rest


def _is_like(slope: Tensor | float, cotangent: Tensor) -> bool:
    return isinstance(slope, Tensor) and slope.dtype == cotangent.dtype


SMALL = 1 << 12  # entries; below, calling an operation costs more than what it does


def together(tensors: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Which go through operations as one: small ones that have come equally far."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, (p, state) in enumerate(zip(tensors, states, strict=True)):
        count, small = _count(state), p.numel() <= SMALL and p.is_contiguous()
        moments = [name for name, value in state.items() if isinstance(value, Tensor)]
        like = (count, p.device, p.dtype, *moments) if small and type(count) is float else i
        found[like].append(i)
    return list(found.values())


def _count(state: dict[str, Any]) -> Count:
    """Which step of the parameter this is; a tensor where the optimizer counts on the device."""
    step = state.get("step", 0)
    on_device = isinstance(step, Tensor) and step.device.type != "cpu"
    # In float64: β**count would otherwise be rounded to float32.
    return (step.double() if on_device else float(step)) + 1


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All their entries; one tensor stays as it is."""
    dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors]
    return dense[0] if len(dense) == 1 else torch.cat([tensor.reshape(-1) for tensor in dense])


def parted(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The other way."""
    if len(like) == 1:
        return [whole]
    parts = whole.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _is_decoupled(optimizer: optim.Optimizer, group: Group) -> bool:
    return type(optimizer) is optim.AdamW or group.get("decoupled_weight_decay", False)


def _descent(group: Group, p: Tensor, g: Tensor, decay: float) -> Tensor:
    """What the rule descends along: the gradient, with the weight decay that is coupled to it."""
    d = -g if group.get("maximize") else g
    return d.add(p, alpha=decay) if decay else d
