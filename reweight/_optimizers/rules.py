"""How some optimizers of torch.optim turn a descent d into a step s, so that θ̂ = θ − α·s.

They are the most used, and two whose own step has another derivative than it should: RAdam with
foreach divides by 0 in its first steps, and that of Adamax is 1/ε where nothing has ever moved. All
others are recorded.

Every rule works entry by entry, so ∂s/∂d is one number for each entry: its slope, which is computed
along with the step. Where there is no derivative (a root at 0, |d| at 0) it is not finite. A rule
takes the param group, the moments of the parameter (none before its first step), which step this
is, and d; it changes none of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, optim

Group: TypeAlias = dict[str, Any]
Moments: TypeAlias = Mapping[str, Tensor]
Count: TypeAlias = float | Tensor
Step: TypeAlias = tuple[Tensor, Tensor | float]
Rule: TypeAlias = Callable[[Group, Moments, Count, Tensor], Step]


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
    first, second = 1 / (1 - beta1**count), 1 / (1 - beta2**count)  # what turns m into m̂, n into n̂
    mean = _mean(moments.get("exp_avg"), d, beta1)
    root = _mean(moments.get("exp_avg_sq"), d * d, beta2).mul_(second).sqrt_()
    scale = (root + eps).reciprocal_()
    step = mean.mul_(scale).mul_(first)
    # ∂s/∂d = (first·(1−β₁) − s·∂√n̂/∂d) / (√n̂ + ε), with ∂√n̂/∂d = second·(1−β₂)·d / √n̂
    bend = torch.div(d, root, out=root).mul_(step).mul_(-second * (1 - beta2))
    return step, bend.add_(first * (1 - beta1)).mul_(scale)


def radam(group: Group, moments: Moments, count: Count, d: Tensor) -> Step:
    """RAdam: Adam's moments, s = m̂ · r·√(1−β₂ᵗ) / (√n + ε) with rectification r, or m̂ at first."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    first, rest = 1 / (1 - beta1**count), 1 - beta2**count
    mean = first * _mean(moments.get("exp_avg"), d, beta1)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * count * beta2**count / rest
    if length <= 5:
        return mean, first * (1 - beta1)
    rectification = (length - 4) * (length - 2) * longest / (longest - 4) / (longest - 2) / length
    root = _mean(moments.get("exp_avg_sq"), d * d, beta2).sqrt_()
    scale = (rest * rectification) ** 0.5 / (root + eps)
    bend = mean * (1 - beta2) * d / root / (root + eps)
    return mean * scale, scale * (first * (1 - beta1) - bend)


def adamax(group: Group, moments: Moments, count: Count, d: Tensor) -> Step:
    """Adamax: m = β₁m + (1−β₁)d, n = max(β₂n, |d| + ε), s = m̂ / n."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    first = 1 / (1 - beta1**count)
    mean = first * _mean(moments.get("exp_avg"), d, beta1)
    old, new = beta2 * moments.get("exp_inf", torch.zeros_like(d)), d.abs() + eps
    largest = torch.maximum(old, new)
    step = mean / largest
    turned = torch.where(new >= old, d / d.abs(), 0)  # ∂n/∂d
    return step, (first * (1 - beta1) - step * turned) / largest


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
