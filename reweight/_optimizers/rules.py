"""How some optimizers of torch.optim turn a descent d into a step s, so that θ̂ = θ − α·s.

They are the most used, and two whose own step has another derivative than it should: RAdam with
foreach divides by 0 in its first steps, and that of Adamax is 1/ε where nothing has ever moved. All
others are recorded.

Every rule works entry by entry, so ∂s/∂d is one number for each entry: its slope, which is computed
along with the step. Where there is no derivative (a root at 0, |d| at 0) it is not finite. A rule
takes the param group, the moments of the parameter (none before its first step), what gives the
function of which step this is, and d; it changes none of them. Where the optimizer counts on the
device, such a function is of tensors, each of them with one entry for each of d.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, optim

from reweight._optimizers.accepted import Group
from reweight._optimizers.entries import Kind, Program, Slopes, is_elsewhere, kinds_of, taken
from reweight._optimizers.slopes import OfEach, Slope

Moments: TypeAlias = Mapping[str, Tensor]
Number: TypeAlias = float | Tensor
Count: TypeAlias = Callable[[Callable[[Any], Any]], Any]
Step: TypeAlias = tuple[Tensor, Tensor | float]
Rule: TypeAlias = Callable[[Group, Moments, Count, Tensor], Step]


def by_rule(optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None]) -> Slopes:
    """The next step and its slopes.

    Args:
        optimizer: of a class that there is a rule for; nothing of it changes.
        gradients: by the id of the parameter; None for none.
    """
    kinds = kinds_of(optimizer, gradients, is_known=True)
    assert kinds is not None
    return taken([_program(optimizer, kind) for kind in kinds], kinds)


def sgd(group: Group, moments: Moments, count: Count, d: Tensor) -> Step:
    """SGD: b = μb + (1−τ)d, or d itself at first; s = b, or d + μb for Nesterov."""
    if group["momentum"] == 0:
        return d, 1.0
    before, kept = moments.get("momentum_buffer"), 1 - group["dampening"]
    buffer, slope = (d, 1.0) if before is None else (_sum(group["momentum"], before, kept, d), kept)
    if not group["nesterov"]:
        return buffer, slope
    return d.add(buffer, alpha=group["momentum"]), 1 + group["momentum"] * slope


def adam(group: Group, moments: Moments, count: Count, d: Tensor) -> Step:
    """Adam: m = β₁m + (1−β₁)d, n = β₂n + (1−β₂)d², s = m̂ / (√n̂ + ε)."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    first = count(lambda t: 1 / (1 - beta1**t))  # what turns m into m̂
    second = count(lambda t: 1 / (1 - beta2**t))  # and n into n̂
    mean = _mean(moments.get("exp_avg"), d, beta1)
    root = _mean(moments.get("exp_avg_sq"), d * d, beta2).mul_(second).sqrt_()
    scale = (root + eps).reciprocal_()
    step = mean.mul_(scale).mul_(first)
    # ∂s/∂d = (first·(1−β₁) − s·∂√n̂/∂d) / (√n̂ + ε), with ∂√n̂/∂d = second·(1−β₂)·d / √n̂
    bend = torch.div(d, root, out=root).mul_(step).mul_(second * (beta2 - 1))
    return step, bend.add_(first * (1 - beta1)).mul_(scale)


def radam(group: Group, moments: Moments, count: Count, d: Tensor) -> Step:
    """RAdam: Adam's moments, s = m̂ · r·√(1−β₂ᵗ) / (√n + ε) with rectification r, or m̂ at first."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    longest = 2 / (1 - beta2) - 1

    def length(t: Number) -> Any:
        return longest - 2 * t * beta2**t / (1 - beta2**t)

    def rectified(t: Number) -> Any:
        n = length(t)
        r = (n - 4) * (n - 2) * longest / (longest - 4) / (longest - 2) / n
        return ((1 - beta2**t) * r) ** 0.5

    first, is_short = count(lambda t: 1 / (1 - beta1**t)), count(lambda t: length(t) <= 5)
    mean = first * _mean(moments.get("exp_avg"), d, beta1)
    if is_short is True or longest <= 5:
        return mean, first * (1 - beta1)
    root = _mean(moments.get("exp_avg_sq"), d * d, beta2).sqrt_()
    scale = count(rectified) / (root + eps)
    bend = mean * (1 - beta2) * d / root / (root + eps)
    step, slope = mean * scale, scale * (first * (1 - beta1) - bend)
    if is_short is False:
        return step, slope
    short = torch.as_tensor(is_short)
    return torch.where(short, mean, step), torch.where(short, first * (1 - beta1), slope)


def adamax(group: Group, moments: Moments, count: Count, d: Tensor) -> Step:
    """Adamax: m = β₁m + (1−β₁)d, n = max(β₂n, |d| + ε), s = m̂ / n."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    first = count(lambda t: 1 / (1 - beta1**t))
    mean = _mean(moments.get("exp_avg"), d, beta1).mul_(first)
    old, size = beta2 * moments.get("exp_inf", torch.zeros_like(d)), d.abs()
    new = size + eps
    largest = torch.maximum(old, new)
    step = mean.div_(largest)
    # ∂n/∂d is d / |d| where n is new: what `where` comes to as well, ten times slower
    turned = torch.ops.aten.threshold_backward(torch.div(d, size, out=size), new.sub_(old), 0)
    return step, turned.mul_(step).neg_().add_(first * (1 - beta1)).div_(largest)


RULES: dict[type[optim.Optimizer], Rule] = {
    optim.SGD: sgd,
    optim.Adam: adam,
    optim.AdamW: adam,
    optim.RAdam: radam,
    optim.Adamax: adamax,
}


def _mean(moment: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """The moving average; it begins at 0."""
    return new * (1 - decay) if moment is None else moment.lerp(new, 1 - decay)


def _sum(decay: float, moment: Tensor, share: float, new: Tensor) -> Tensor:
    return (decay * moment).add_(new, alpha=share)


def _program(optimizer: optim.Optimizer, kind: Kind) -> Program:
    """θ̂ = θ − α·s, and its slope ∂θ̂/∂g."""
    group, rule = optimizer.param_groups[kind.group], RULES[type(optimizer)]
    state: Mapping[str, Any] = optimizer.state.get(kind.columns[1][0], {})
    number = None if "step" in kind.numbers else float(state.get("step", 0)) + 1
    lr, decay = group["lr"], group.get("weight_decay", 0)
    left = 1 - lr * decay  # of a tensor in its precision, as the class has it
    if isinstance(lr, Tensor) and not is_elsewhere(lr):  # it may be of another device than entries
        lr, left = lr.item(), left.item()
    decoupled = type(optimizer) is optim.AdamW or group.get("decoupled_weight_decay", False)

    @torch.no_grad()
    def program(inputs: Sequence[Tensor], of_each: OfEach, out: Tensor) -> Slope:
        g, p, *moments = inputs
        d = -g if group.get("maximize") else g
        if decay and not decoupled:
            d = d.add(p, alpha=decay)
        start = p * left if decoupled and decay else p
        count = _counted(of_each, p.dtype) if number is None else lambda of: of(number)
        step, slope = rule(group, dict(zip(kind.names, moments, strict=True)), count, d)
        if isinstance(lr, Tensor):
            torch.sub(start, lr * step, out=out)
        else:
            torch.sub(start, step, alpha=lr, out=out)
        moved: Slope = Slope(1.0) * slope * (lr if group.get("maximize") else -lr)
        return moved

    return program


def _counted(of_each: OfEach, dtype: torch.dtype) -> Count:
    """Of steps counted on the device."""
    number = of_each.numbers["step"].double() + 1  # β**t would otherwise be rounded to float32

    wanted = torch.promote_types(dtype, torch.float32)
    return lambda of: of_each.spread(of(number), wanted)
