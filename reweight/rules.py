"""How each optimizer of torch.optim turns descents d into steps s, so that θ̂ = θ − α·s.

torchopt carries the moments. Each rule takes the param group, the state of every parameter ({} for
one that has not moved yet) and the descents, and changes none of them.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
import torchopt.transform as transform
from torch import Tensor, optim
from torchopt.base import GradientTransformation
from torchopt.transform.scale_by_adadelta import ScaleByAdadeltaState
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.scale_by_adamax import ScaleByAdamaxState
from torchopt.transform.scale_by_radam import ScaleByRAdamState
from torchopt.transform.scale_by_rms import ScaleByRmsState
from torchopt.transform.scale_by_rss import ScaleByRssState
from torchopt.transform.scale_by_stddev import ScaleByRStdDevState
from torchopt.transform.trace import TraceState

Group: TypeAlias = dict[str, Any]
States: TypeAlias = list[dict[str, Any]]
Tensors: TypeAlias = tuple[Tensor, ...]
Rule: TypeAlias = Callable[[Group, States, Tensors], Tensors]


def sgd(group: Group, states: States, descents: Tensors) -> Tensors:
    """SGD: b = μb + (1−τ)d, or d itself at first; s = b, or d + μb for Nesterov."""
    return _momentum(
        group["momentum"], group["dampening"], group["nesterov"], states, descents, fresh=None
    )


def adam(group: Group, states: States, descents: Tensors) -> Tensors:
    """Adam: m = β₁m + (1−β₁)d, n = β₂n + (1−β₂)d², s = m̂ / (√n̂ + ε)."""
    # Counted in float64: β**count would otherwise be rounded to float32.
    counts = tuple(
        torch.as_tensor(state.get("step", 0.0), dtype=torch.float64, device=d.device)
        for state, d in zip(states, descents, strict=True)
    )
    state = ScaleByAdamState(
        _moments(states, "exp_avg", descents), _moments(states, "exp_avg_sq", descents), counts
    )
    return _transformed(transform.scale_by_adam(*_betas(group), group["eps"]), state, descents)


def rmsprop(group: Group, states: States, descents: Tensors) -> Tensors:
    """RMSprop: n = αn + (1−α)d², s = d / (√n + ε), or with m the mean of d, d / (√(n − m²) + ε)."""
    second = _moments(states, "square_avg", descents)
    if group["centered"]:
        first = _moments(states, "grad_avg", descents)
        scaled = _transformed(
            transform.scale_by_stddev(group["alpha"], group["eps"]),
            ScaleByRStdDevState(mu=first, nu=second),
            descents,
        )
    else:
        scaled = _transformed(
            transform.scale_by_rms(group["alpha"], group["eps"]), ScaleByRmsState(second), descents
        )
    return _momentum(group["momentum"], 0.0, False, states, scaled, fresh=False)


def adagrad(group: Group, states: States, descents: Tensors) -> Tensors:
    """Adagrad: n = n + d², s = d / (√n + ε) / (1 + (t−1)·lr_decay)."""
    scaled = _transformed(
        transform.scale_by_rss(0.0, group["eps"]),
        ScaleByRssState(_moments(states, "sum", descents)),
        descents,
    )
    return tuple(
        s / (1 + torch.as_tensor(state.get("step", 0), dtype=torch.float64) * group["lr_decay"])
        for state, s in zip(states, scaled, strict=True)
    )


def adadelta(group: Group, states: States, descents: Tensors) -> Tensors:
    """Adadelta: n = ρn + (1−ρ)d², s = d · √(a + ε) / √(n + ε), with a the mean of s²."""
    state = ScaleByAdadeltaState(
        mu=_moments(states, "square_avg", descents), nu=_moments(states, "acc_delta", descents)
    )
    return _transformed(transform.scale_by_adadelta(group["rho"], group["eps"]), state, descents)


def radam(group: Group, states: States, descents: Tensors) -> Tensors:
    """RAdam: Adam's moments, s = m̂ · r / (√n + ε) with the rectification r, or m̂ at first."""
    names = ("exp_avg", "exp_avg_sq")
    return _counted(transform.scale_by_radam, ScaleByRAdamState, names, group, states, descents)


def adamax(group: Group, states: States, descents: Tensors) -> Tensors:
    """Adamax: m = β₁m + (1−β₁)d, n = max(β₂n, |d| + ε), s = m̂ / n."""
    names = ("exp_avg", "exp_inf")
    return _counted(transform.scale_by_adamax, ScaleByAdamaxState, names, group, states, descents)


RULES: dict[type[optim.Optimizer], Rule] = {
    optim.SGD: sgd,
    optim.Adam: adam,
    optim.AdamW: adam,
    optim.RMSprop: rmsprop,
    optim.Adagrad: adagrad,
    optim.Adadelta: adadelta,
    optim.RAdam: radam,
    optim.Adamax: adamax,
}

SECOND_MOMENTS: dict[type[optim.Optimizer], str] = {
    optim.Adam: "exp_avg_sq",
    optim.AdamW: "exp_avg_sq",
    optim.NAdam: "exp_avg_sq",
    optim.RAdam: "exp_avg_sq",
    optim.RMSprop: "square_avg",
    optim.Adagrad: "sum",
    optim.Adamax: "exp_inf",
}
"""What the step divides by the root of: where it and the descent are 0, there is no derivative."""


def _momentum(
    momentum: float,
    dampening: float,
    nesterov: bool,
    states: States,
    descents: Tensors,
    fresh: bool | None,
) -> Tensors:
    """The buffer of each parameter, moved; one without a buffer begins with its descent."""

    def run(begins: Hashable, states: States, descents: Tensors) -> Tensors:
        trace = transform.trace(momentum, dampening, nesterov)
        if not begins:  # the first call of a transformation takes its state for empty: spend it
            trace.update((), TraceState(trace=()), inplace=False)
        state = TraceState(trace=_moments(states, "momentum_buffer", descents))
        return _transformed(trace, state, descents)

    begins = [state.get("momentum_buffer") is None if fresh is None else fresh for state in states]
    return _in_parts(begins, run, states, descents)


def _counted(
    scale: Callable[..., GradientTransformation],
    make_state: Callable[..., Any],
    names: tuple[str, str],
    group: Group,
    states: States,
    descents: Tensors,
) -> Tensors:
    """Rules for which torchopt keeps one count for all parameters: those of a count at a time."""

    def run(count: Hashable, states: States, descents: Tensors) -> Tensors:
        first, second = (_moments(states, name, descents) for name in names)
        state = make_state(mu=first, nu=second, t=count)
        return _transformed(scale(*_betas(group), group["eps"]), state, descents)

    counts = [int(state.get("step", 0)) + 1 for state in states]
    return _in_parts(counts, run, states, descents)


def _in_parts(
    keys: list[Any],
    run: Callable[[Hashable, States, Tensors], Tensors],
    states: States,
    descents: Tensors,
) -> Tensors:
    """Run a rule over the parameters of each key at once, and put the steps back in order."""
    steps = list(descents)
    for key in set(keys):
        chosen = [i for i, other in enumerate(keys) if other == key]
        part = run(key, [states[i] for i in chosen], tuple(descents[i] for i in chosen))
        for i, step in zip(chosen, part, strict=True):
            steps[i] = step
    return tuple(steps)


def _moments(states: States, name: str, descents: Tensors) -> Tensors:
    """A moment of every parameter, zeros where there is none yet."""
    return tuple(
        torch.zeros_like(d) if state.get(name) is None else _dense(state[name])
        for state, d in zip(states, descents, strict=True)
    )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _transformed(transformation: GradientTransformation, state: Any, descents: Tensors) -> Tensors:
    steps: Tensors = transformation.update(descents, state, inplace=False)[0]
    return steps


def _betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return beta1, beta2
