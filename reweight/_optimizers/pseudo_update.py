"""The pseudo update θ̂ = U(θ, ∇θ L_tr): the optimizer's next step, made differentiable.

It starts from the param groups, learning rates and state of the real optimizer and changes none of
them. What ``rules`` lacks is recorded as it runs, and an optimizer of torchopt is one already.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torchopt
from torch import Tensor, optim

from reweight._optimizers.accepted import (
    AnyOptimizer,
    Exactness,
    Parameters,
    PseudoUpdate,
    groups_of,
)
from reweight._optimizers.rules import RULES, Count, Group, Moments, Step
from reweight._ranks.collectives import local
from reweight._ranks.shards import shard_like


def pseudo_update(
    optimizers: Sequence[AnyOptimizer],
    parameters: Parameters,
    gradients: Parameters,
    exactness: Exactness = "exact",
    clip_grad_norm: float | None = None,
) -> PseudoUpdate:
    """What the parameters would be after the next step of every optimizer.

    Args:
        optimizers: as :func:`as_optimizers` gives them.
        parameters: θ by name.
        gradients: by name; a parameter that has none, or that no optimizer holds, stays where it
            is, as in ``torch.optim``.
        exactness: "gradient_descent" takes θ̂ = θ − α·gradient with the learning rate of the group,
            and nothing else of the optimizer, for its step: an approximation, for optimizers of
            torch's form that cannot be differentiated.
        clip_grad_norm: the norm that the gradients are clipped to first; None for no clipping.

    Returns:
        :class:`PseudoUpdate`.
    """
    given = gradients
    if clip_grad_norm is not None:
        gradients = clip_gradients(gradients, clip_grad_norm)
    names = {id(parameter): name for name, parameter in parameters.items()}
    updated = {name: parameter.detach() for name, parameter in parameters.items()}
    device = next(iter(parameters.values())).device
    num_zero_moments = torch.zeros((), dtype=torch.int64, device=device)
    for optimizer in optimizers:
        groups = [
            [names[id(p)] for p in group["params"] if id(p) in names]
            for group in groups_of(optimizer)
        ]
        if exactness == "exact" and _is_recorded(optimizer):
            # As a whole, for groups may depend on each other.
            own = {name: gradients.get(name) for held in groups for name in held}
            if any(gradient is not None for gradient in own.values()):
                by_id = {id(parameters[name]): gradient for name, gradient in own.items()}
                from reweight._optimizers.recorded_update import by_recording  # rarely needed

                moved = by_recording(optimizer, by_id, num_zero_moments)
                updated.update((names[key], parameter) for key, parameter in moved.items())
            continue
        for index, (group, held) in enumerate(zip(groups_of(optimizer), groups, strict=True)):
            held = [name for name in held if name in gradients]
            if held:
                there = [parameters[name] for name in held], [gradients[name] for name in held]
                new, num_zero = _by_group(optimizer, index, group, exactness, *there)
                updated.update(zip(held, new, strict=True))
                num_zero_moments += num_zero
    return PseudoUpdate(given, updated, num_zero_moments)


def way_of(optimizer: AnyOptimizer, exactness: Exactness) -> str:
    """How its next step is made differentiable, in words."""
    if exactness == "gradient_descent":
        return "a plain gradient step in its place, approximate"
    if isinstance(optimizer, torchopt.Optimizer):
        return "differentiable itself"
    if _is_recorded(optimizer):
        return "its own step, recorded and verified"
    return "in closed form"


def clip_gradients(gradients: Parameters, max_norm: float) -> Parameters:
    """As ``torch.nn.utils.clip_grad_norm_`` does, differentiably and not in place."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    return {name: gradient * factor for name, gradient in gradients.items()}


def _is_recorded(optimizer: AnyOptimizer) -> TypeGuard[optim.Optimizer]:
    """Whether there is nothing else for it than its own step. A subclass may do anything in it."""
    if isinstance(optimizer, torchopt.Optimizer):
        return False
    return type(optimizer) not in RULES or any(g.get("amsgrad") for g in optimizer.param_groups)


def _by_group(
    optimizer: AnyOptimizer,
    index: int,
    group: Group,
    exactness: Exactness,
    parameters: list[Tensor],
    gradients: list[Tensor],
) -> tuple[list[Tensor], Tensor | int]:
    """One group, where the others play no part."""
    if exactness == "gradient_descent":
        rate = -group["lr"] if group.get("maximize") else group["lr"]
        return [p - rate * g for p, g in zip(parameters, gradients, strict=True)], 0
    if isinstance(optimizer, torchopt.Optimizer):
        from reweight._optimizers.torchopt_update import by_torchopt

        return by_torchopt(optimizer, index, parameters, gradients)
    return _by_rule(optimizer, group, parameters, gradients)


def _by_rule(
    optimizer: optim.Optimizer, group: Group, parameters: list[Tensor], gradients: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """One group, shard by shard."""
    states = [optimizer.state.get(p, {}) for p in parameters]
    found: list[Any] = [None] * len(parameters)
    num_zero = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
    for members in _together(parameters, states):
        chosen = [local(parameters[i]) for i in members]
        values, slope = _moved(
            optimizer,
            group,
            _joined(chosen),
            _joined([local(gradients[i].detach()) for i in members]),
            {
                name: _joined([local(states[i][name]) for i in members])
                for name, value in states[members[0]].items()
                if name != "step" and isinstance(value, Tensor)
            },
            _count(states[members[0]]),
        )
        slopes: Sequence[Tensor | float] = [slope] * len(members)
        if isinstance(slope, Tensor) and slope.shape == values.shape:
            num_zero += torch.count_nonzero(slope - slope)  # NaN where it is not finite
            slopes = _parted(slope.nan_to_num_(0, 0, 0), chosen)
        for i, value, slope in zip(members, _parted(values, chosen), slopes, strict=True):
            found[i] = [shard_like(gradients[i], part) for part in (value, slope)]
    moved, slopes = zip(*found, strict=True)
    return list(_Moved.apply(slopes, *gradients, *moved)), num_zero  # type: ignore[no-untyped-call]


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
        numbers = all(isinstance(slope, float) for slope in ctx.slopes)
        there = [c for c in cotangents if c is not None]
        pairs = list(zip(cotangents, ctx.slopes, strict=True))
        alike = numbers or all(c is not None and _is_like(slope, c) for c, slope in pairs)
        if alike and len(there) == len(cotangents):
            return None, *torch._foreach_mul(there, ctx.slopes), *(None for _ in cotangents)
        gradients = [None if c is None else (c * slope).to(c.dtype) for c, slope in pairs]
        return None, *gradients, *(None for _ in cotangents)


def _is_like(slope: Tensor | float, cotangent: Tensor) -> bool:
    return isinstance(slope, Tensor) and slope.dtype == cotangent.dtype


_SMALL = 1 << 12  # entries; below, calling an operation costs more than what it does


def _together(parameters: list[Tensor], states: list[dict[str, Any]]) -> list[list[int]]:
    """Which parameters go through a rule as one: small ones that have come equally far."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, (p, state) in enumerate(zip(parameters, states, strict=True)):
        count, small = _count(state), p.numel() <= _SMALL and p.is_contiguous()
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


def _joined(tensors: list[Tensor]) -> Tensor:
    dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors]
    return dense[0] if len(dense) == 1 else torch.cat([tensor.reshape(-1) for tensor in dense])


def _parted(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    if len(like) == 1:
        return [joined]
    parts = joined.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _is_decoupled(optimizer: optim.Optimizer, group: Group) -> bool:
    return type(optimizer) is optim.AdamW or group.get("decoupled_weight_decay", False)


def _descent(group: Group, p: Tensor, g: Tensor, decay: float) -> Tensor:
    """What the rule descends along: the gradient, with the weight decay that is coupled to it."""
    d = -g if group.get("maximize") else g
    return d.add(p, alpha=decay) if decay else d
