"""The pseudo update θ̂ = U(θ, ∇θ L_tr): the optimizer's next step, made differentiable.

It starts from the param groups, learning rates and state of the real optimizer and changes none of
them. torchopt carries the moments; sign, weight decay and step size stand here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torchopt
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.trace import TraceState

Parameters: TypeAlias = dict[str, Tensor]
Group: TypeAlias = dict[str, Any]
States: TypeAlias = list[dict[str, Any]]


class PseudoUpdate(NamedTuple):
    """θ̂ and what had to be left out of its derivative.

    Attributes:
        parameters: θ̂ by name, differentiable in the gradients.
        num_zero_moments: how many entries have no derivative, because gradient and second moment
            are both 0 there (dead units, a bias before BatchNorm); it is taken as 0.
    """

    parameters: Parameters
    num_zero_moments: Tensor | int


def pseudo_update(
    optimizer: Optimizer, parameters: Parameters, gradients: Parameters
) -> PseudoUpdate:
    """What the parameters would be after ``optimizer.step()`` with these gradients.

    Args:
        optimizer: SGD, Adam or AdamW of ``torch.optim``, see :func:`check_optimizer`.
        parameters: θ by name.
        gradients: by name; a parameter that has none, or that the optimizer does not hold, stays
            where it is, as in ``torch.optim``.

    Returns:
        :class:`PseudoUpdate`.
    """
    names = {id(parameters[name]): name for name in gradients}
    updated = {name: parameter.detach() for name, parameter in parameters.items()}
    num_zero_moments: Tensor | int = 0
    for group in optimizer.param_groups:
        held = [names[id(p)] for p in group["params"] if id(p) in names]
        if not held:
            continue
        moved, num_zero = _RULES[type(optimizer)](
            group,
            [optimizer.state.get(parameters[name], {}) for name in held],
            [updated[name] for name in held],
            [-gradients[name] if group["maximize"] else gradients[name] for name in held],
        )
        updated.update(zip(held, moved, strict=True))
        num_zero_moments = num_zero_moments + num_zero
    return PseudoUpdate(updated, num_zero_moments)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse, with a reason, an optimizer whose step has no rule here.

    Raises:
        TypeError: not SGD, Adam or AdamW itself (a subclass may do anything in its ``step``).
        ValueError: AMSGrad, which torchopt has no rule for.
    """
    if type(optimizer) not in _RULES:
        raise TypeError(
            f"`optimizer` must be one of {', '.join(rule.__name__ for rule in _RULES)} of "
            f"torch.optim, whose step can be differentiated here, got {type(optimizer).__name__}."
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError(
            "`optimizer` must not use amsgrad, whose step cannot be differentiated here, got "
            "amsgrad=True. Use amsgrad=False."
        )


def is_cold(optimizer: Optimizer) -> bool:
    """Whether this is an Adam without state: its step is sign(g) then, with derivative about 0."""
    return isinstance(optimizer, Adam | AdamW) and not any(optimizer.state.values())


def step_where(optimizer: Optimizer, ok: Tensor) -> None:
    """``optimizer.step()`` if ``ok`` holds, else nothing, without waiting for the device to tell.

    Takes the gradients away afterwards. State kept on another device than ``ok`` (the step count of
    Adam, which lives on the CPU) moves on in either case.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = torch.where(ok, parameter.grad, 0)
    before = _tensors(optimizer, parameters)
    before = {key: value.detach().clone() for key, value in before.items()}
    optimizer.step()
    with torch.no_grad():
        for key, value in _tensors(optimizer, parameters).items():
            if value.device == ok.device:
                value.copy_(torch.where(ok, value, before.get(key, torch.zeros_like(value))))
    optimizer.zero_grad(set_to_none=True)


def _tensors(optimizer: Optimizer, parameters: list[Tensor]) -> dict[tuple[int, str], Tensor]:
    """The parameters and all tensors of their state."""
    tensors = {(i, ""): parameter for i, parameter in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[i, name] = value
    return tensors


def _sgd(
    group: Group, states: States, parameters: list[Tensor], descents: list[Tensor]
) -> tuple[list[Tensor], Tensor | int]:
    """SGD: b = μb + (1−τ)d (d itself at first), θ̂ = θ − α·b, or θ − α·(d + μb) for Nesterov."""
    decay = group["weight_decay"]
    if decay != 0:
        descents = [d.add(p, alpha=decay) for d, p in zip(descents, parameters, strict=True)]
    buffers = [state.get("momentum_buffer") for state in states]
    steps: list[Any] = [None] * len(descents)
    for fresh in (True, False):
        chosen = [i for i, buffer in enumerate(buffers) if (buffer is None) == fresh]
        if not chosen:
            continue
        trace = torchopt.transform.trace(group["momentum"], group["dampening"], group["nesterov"])
        if not fresh:  # the first call of a transformation takes its state for empty: spend it
            trace.update((), TraceState(trace=()), inplace=False)
        state = TraceState(
            tuple(torch.zeros_like(parameters[i]) if fresh else buffers[i] for i in chosen)
        )
        result, _ = trace.update(tuple(descents[i] for i in chosen), state, inplace=False)
        for i, step in zip(chosen, result, strict=True):
            steps[i] = step
    return [p - group["lr"] * s for p, s in zip(parameters, steps, strict=True)], 0


def _adam(
    group: Group, states: States, parameters: list[Tensor], descents: list[Tensor]
) -> tuple[list[Tensor], Tensor | int]:
    """Adam: m = β₁m + (1−β₁)d, n = β₂n + (1−β₂)d², θ̂ = θ − α·m̂ / (√n̂ + ε); AdamW shrinks θ."""
    lr, decay = group["lr"], group["weight_decay"]
    if decay != 0:
        if group.get("decoupled_weight_decay"):
            parameters = [p * (1 - lr * decay) for p in parameters]
        else:
            descents = [d.add(p, alpha=decay) for d, p in zip(descents, parameters, strict=True)]

    def moments(name: str) -> tuple[Tensor, ...]:
        pairs = zip(states, parameters, strict=True)
        return tuple(state[name] if state else torch.zeros_like(p) for state, p in pairs)

    second_moments = moments("exp_avg_sq")
    descents, num_zero = _without_zero_moments(descents, second_moments)
    # Counted in float64: β**count would otherwise be rounded to float32.
    counts = tuple(
        torch.as_tensor(state.get("step", 0.0), dtype=torch.float64, device=p.device)
        for state, p in zip(states, parameters, strict=True)
    )
    beta1, beta2 = group["betas"]
    transformation = torchopt.transform.scale_by_adam(beta1, beta2, group["eps"])
    steps, _ = transformation.update(
        tuple(descents), ScaleByAdamState(moments("exp_avg"), second_moments, counts), inplace=False
    )
    return [p - lr * s for p, s in zip(parameters, steps, strict=True)], num_zero


def _adamw(
    group: Group, states: States, parameters: list[Tensor], descents: list[Tensor]
) -> tuple[list[Tensor], Tensor | int]:
    return _adam({**group, "decoupled_weight_decay": True}, states, parameters, descents)


def _without_zero_moments(
    descents: list[Tensor], second_moments: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Take the derivative of d/√n as 0, not NaN, where both are 0, and count such entries."""
    num_zero = torch.zeros((), dtype=torch.int64, device=descents[0].device)
    guarded = []
    for descent, second_moment in zip(descents, second_moments, strict=True):
        zero = (descent.detach() == 0) & (second_moment == 0)
        num_zero = num_zero + zero.sum()
        descent = descent.view_as(descent)
        if descent.requires_grad:
            descent.register_hook(lambda gradient, zero=zero: gradient.masked_fill(zero, 0))
        guarded.append(descent)
    return guarded, num_zero


_Rule: TypeAlias = Callable[
    [Group, States, list[Tensor], list[Any]], tuple[list[Tensor], Tensor | int]
]
_RULES: dict[type[Optimizer], _Rule] = {SGD: _sgd, Adam: _adam, AdamW: _adamw}
