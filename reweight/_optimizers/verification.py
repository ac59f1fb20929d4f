"""Is a recorded step the class's own, and its derivative that of the class's own?

It is asked where an optimizer is used first, and ever more rarely from then on, of copies, in
float64 too: the only time that the device is waited for.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim

from reweight._optimizers.own_step import copied, own_step
from reweight._optimizers.recorded_step import How, RecordedStep, record, recorded_step
from reweight._optimizers.recorder import Recorder
from reweight._optimizers.scalars import Refused
from reweight._optimizers.twin import Alias, part, twin
from reweight._ranks.collectives import local
from reweight._ranks.shards import shard_like, whole

_logger = logging.getLogger("reweight")

Gradients = Mapping[int, Tensor | None]
_ENTRIES = 1 << 22  # of parameters; more are verified only where they are of another kind


class Verified(NamedTuple):
    """A recorded step that is the class's own.

    Attributes:
        optimizer: of some of the parameters, if there are many.
        leaves: gradients that it is a function of, by the id of the parameter.
        how: it can be recorded.
        step: recorded.
        moves: whether it moves anything, without which little is known.
    """

    optimizer: optim.Optimizer
    leaves: Gradients
    how: How
    step: RecordedStep
    moves: bool


def verify(optimizer: optim.Optimizer, gradients: Gradients) -> Verified:
    """Raise Refused, with the reason, unless both are so along a direction drawn at random.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none.
    """
    few, gradients = _few(optimizer, gradients)
    own = own_step(few, gradients, copied)
    leaves = {k: None if g is None else g.clone().requires_grad_() for k, g in gradients.items()}
    how, ahead = _first_that_runs(few, leaves)
    moved = False
    for p in (p for group in few.param_groups for p in group["params"]):
        if id(p) not in ahead.parameters or not p.numel():
            continue
        new, real = whole(ahead.parameters[id(p)].detach()), whole(own[id(p)])
        step = (real - whole(p.detach())).abs().max().item()
        # Products in bfloat16 round with what the kernel is given.
        rounding = 2 * torch.finfo(torch.bfloat16).eps if ahead.recorder.is_widened else 1e-3
        allowed = 4 * torch.finfo(p.dtype).eps * real.abs().max().item() + rounding * step
        off = (new - real).abs().max().item()
        if not off <= allowed:
            raise Refused(f"its step gives other parameters, by {off:.1e}, when it is recorded")
        moved = moved or step > 0
    try:
        slopes = _slopes(few, gradients, torch.float64, how.keeps_numbers)
    except Refused:
        raise
    except Exception:  # code of its own bears no precision but that of the parameters
        slopes = _slopes(few, gradients, None, how.keeps_numbers)
    _require_derivative(optimizer, slopes, moved)
    return Verified(few, leaves, how, ahead, moved)


def _first_that_runs(optimizer: optim.Optimizer, leaves: Gradients) -> tuple[How, RecordedStep]:
    ways = [How(), How(keeps_numbers=False), How(widened=False), How(False, False)]
    for how in ways:
        try:
            return how, recorded_step(optimizer, leaves, how)
        except Refused:
            raise
        except Exception as error:
            failure = error
    raise failure


def _require_derivative(optimizer: optim.Optimizer, slopes: "_Slopes", moved: bool) -> None:
    """Raise Refused unless the slopes agree; log it if they do but for numbers."""
    found, recorder = slopes.by_derivative, slopes.recorder
    if slopes.is_flat and moved and recorder.signs:
        raise Refused("its step follows the signs of the gradient alone, which have no derivative")
    near = min(slopes.by_differences, key=lambda difference: abs(difference - found))
    off, (one, another) = abs(found - near), slopes.by_differences[:2]
    # Where the step rounds, differences themselves are off, as two of them show.
    rounding = min(abs(one - another), 0.02 * abs(near))
    if off <= slopes.tolerance * abs(near) + slopes.floor + rounding:
        return
    if not recorder.has_constants:
        lost = f"; {', '.join(sorted(recorder.lost))} has none" if recorder.lost else ""
        raise Refused(
            f"its derivative is {found:.3g} along a direction in which differences give "
            f"{near:.3g}{lost}"
        )
    _logger.warning(
        "%s takes numbers out of tensors, whose derivative is left out: hypergradients are "
        "approximate, by %.1g of the derivative of its step along a direction drawn at random.",
        type(optimizer).__name__,
        off / abs(near) if near else float("inf"),
    )


def kinds(optimizer: optim.Optimizer, gradients: Gradients) -> dict[Any, int]:
    """The parameters that a step may treat differently, and one of each, the smallest."""
    found: dict[Any, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        switches = tuple(v for v in group.values() if v is None or isinstance(v, bool | str))
        for p in group["params"]:
            if gradients.get(id(p)) is not None:
                state = frozenset(map(str, optimizer.state.get(p, ())))
                kind = (number, switches, p.dim(), p.dtype, p.device, state)
                if kind not in found or p.numel() < found[kind].numel():
                    found[kind] = p  # the first of equals, as on every rank
    return {kind: id(p) for kind, p in found.items()}


def _few(
    optimizer: optim.Optimizer, gradients: Gradients
) -> tuple[optim.Optimizer, dict[int, Tensor | None]]:
    """The optimizer of some of its parameters, in the same memory, and their gradients."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    chosen, num_entries = set(kinds(optimizer, gradients).values()), 0
    for p in sorted(held, key=lambda p: p.numel()):
        num_entries += p.numel()
        if num_entries <= _ENTRIES:
            chosen.add(id(p))
    is_part = len(chosen) < len(held) and "param_groups" in vars(optimizer)
    few = part(optimizer, chosen) if is_part else optimizer
    held = [p for group in few.param_groups for p in group["params"]]
    some = {id(p): gradients[id(p)] for p in held if id(p) in gradients}
    return few, {key: None if g is None else g.detach() for key, g in some.items()}


class _Slopes(NamedTuple):
    """⟨c, ∂θ̂/∂g·u⟩ for some c and u, and what it may be off."""

    by_derivative: float
    by_differences: list[float]
    is_flat: bool
    tolerance: float
    floor: float
    recorder: Recorder


def _slopes(
    optimizer: optim.Optimizer,
    gradients: Gradients,
    wide: torch.dtype | None,
    keeps_numbers: bool,
) -> _Slopes:
    """With everything in that precision, or, for None, in that of the parameters."""
    alias: Alias = copied if wide is None else lambda tensor: copied(tensor, wide)
    origin = twin(optimizer, gradients, alias)
    leaves = {
        id(p): p.grad.requires_grad_()
        for key, p in origin.parameters.items()
        if gradients.get(key) is not None and p.grad is not None
    }
    start = {id(p): p.detach().clone() for p in origin.parameters.values()}
    ahead, recorder = record(origin.optimizer, leaves, wide, keeps_numbers, default_dtype=wide)
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        noise = torch.randn(local(like).shape, generator=generator, dtype=torch.float64)
        result: Tensor = shard_like(like, noise.to(like.device, like.dtype))
        return result

    # Of one size for every parameter, so that none hides behind another.
    lengths = {key: float(whole((t.detach() - start[key]).norm())) for key, t in ahead.items()}
    c = {key: drawn(t) / (lengths[key] or 1) for key, t in ahead.items()}
    value = torch.stack([whole((c[key] * t).sum()) for key, t in ahead.items()]).sum()
    if not value.requires_grad:
        raise Refused("its step does not depend on the gradient")
    found = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    # In proportion: there may be no derivative where a gradient is 0, and is not asked for one.
    u = {key: drawn(g) * g.detach().abs() for key, g in leaves.items()}
    for slope, g in zip(found, leaves.values(), strict=True):
        if not (local(slope).isfinite() | (local(g) == 0)).all():
            raise Refused("its derivative is not finite")
    v = dict(zip(leaves, (_finite(slope) for slope in found), strict=True))
    by_derivative = sum(float(whole((v[key] * u[key]).sum())) for key in leaves)

    def at(h: float) -> float:
        moved = {key: g.detach() + h * u[key] for key, g in leaves.items()}
        own = own_step(origin.optimizer, moved, copied, wide)
        offs = ((c[key] * (own[key] - ahead[key].detach())).sum() for key in ahead)
        return sum(float(whole(off)) for off in offs)

    # In float64 differences are good to 1e-6 and better, but for kinks of the step.
    sizes = (1e-3, 1e-4, 1e-5, 1e-6) if wide else (1e-1, 3e-2, 1e-2)
    return _Slopes(
        by_derivative,
        [(at(h) - at(-h)) / (2 * h) for h in sizes],
        not any(float(whole(slope.abs().sum())) for slope in v.values()),
        1e-3 if wide else 0.05,
        (1e-7 if wide else 1e-2) * len(leaves) ** 0.5,
        recorder,
    )


def _finite(tensor: Tensor) -> Tensor:
    """With 0 for what is not finite."""
    result: Tensor = shard_like(tensor, torch.nan_to_num(local(tensor), 0, 0, 0))
    return result
