"""The pseudo update θ̂ = U(θ, ∇θ L_tr): the optimizer's next step, made differentiable.

It starts from the param groups, learning rates and state of the real optimizer and changes none of
them. What ``rules`` lacks is recorded as it runs, and an optimizer of torchopt is one already.
"""

from collections.abc import Sequence

import torch
import torchopt
from torch import Tensor, optim

from reweight._optimizers.accepted import (
    AnyOptimizer,
    Exactness,
    Group,
    Parameters,
    PseudoUpdate,
    groups_of,
)
from reweight._optimizers.entries import differentiable
from reweight._optimizers.rules import RULES, by_rule


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
        if exactness == "exact" and isinstance(optimizer, optim.Optimizer):
            # As a whole, for groups may depend on each other.
            own = {name: gradients.get(name) for held in groups for name in held}
            if any(gradient is not None for gradient in own.values()):
                by_id = {id(parameters[name]): gradient for name, gradient in own.items()}
                moved = _by_own_step(optimizer, by_id, num_zero_moments)
                updated.update((names[key], parameter) for key, parameter in moved.items())
            continue
        for index, (group, held) in enumerate(zip(groups_of(optimizer), groups, strict=True)):
            held = [name for name in held if name in gradients]
            if held:
                there = [parameters[name] for name in held], [gradients[name] for name in held]
                new, num_zero = _by_group(optimizer, index, group, *there)
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


def _is_recorded(optimizer: optim.Optimizer) -> bool:
    """Whether there is nothing else for it than its own step. A subclass may do anything in it.

    With tensors for betas a class rounds their powers as they are typed, each in its own way.
    """
    return type(optimizer) not in RULES or any(
        group.get("amsgrad") or any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
        for group in optimizer.param_groups
    )


def _by_own_step(
    optimizer: optim.Optimizer, gradients: dict[int, Tensor | None], num_zero_moments: Tensor
) -> dict[int, Tensor]:
    if _is_recorded(optimizer):
        from reweight._optimizers.recorded_update import by_recording  # rarely needed

        return by_recording(optimizer, gradients, num_zero_moments)
    step = by_rule(optimizer, gradients)
    for number in step.nums_cut:
        num_zero_moments += number.to(num_zero_moments.device)
    return differentiable(step, gradients)


def _by_group(
    optimizer: AnyOptimizer,
    index: int,
    group: Group,
    parameters: list[Tensor],
    gradients: list[Tensor],
) -> tuple[list[Tensor], Tensor | int]:
    """One group, where the others play no part: of torchopt, or a plain step of any other."""
    if isinstance(optimizer, torchopt.Optimizer):
        from reweight._optimizers.torchopt_update import by_torchopt

        return by_torchopt(optimizer, index, parameters, gradients)
    rate = -group["lr"] if group.get("maximize") else group["lr"]
    return [p - rate * g for p, g in zip(parameters, gradients, strict=True)], 0
