"""The next step of an optimizer of any class: recorded, and verified where it is used first."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, optim

from reweight._optimizers.accepted import why_not
from reweight._optimizers.entries import differentiable, joined, parted, plainly_finite, together
from reweight._optimizers.own_step import By
from reweight._optimizers.recorded_batches import in_batches
from reweight._optimizers.recorded_entries import entry_by_entry
from reweight._optimizers.recorded_step import USUAL, How, RecordedStep, recorded_step
from reweight._optimizers.verification import Verified, kinds, verify
from reweight._ranks.collectives import local
from reweight._ranks.shards import shard_like


class _Known(NamedTuple):
    kind: type[optim.Optimizer]
    kinds: frozenset[Any]
    how: How
    num_uses: int  # since it was verified

    @property
    def is_looked_at_again(self) -> bool:
        """Whether it is due: a step may do something else from some turn on."""
        return self.num_uses in _AGAIN_AFTER


_known: WeakKeyDictionary[optim.Optimizer, _Known] = WeakKeyDictionary()
_AGAIN_AFTER = {4**n for n in range(1, 12)}  # uses


def by_recording(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], num_cut: Tensor
) -> dict[int, Tensor]:
    """θ̂ by the id of the parameter, of those that have a gradient.

    Args:
        optimizer: of any class.
        gradients: by the id of the parameter; None for none. Others keep the gradient they have.
        num_cut: a count, to which the entries of its derivative that are not finite, and so taken
            as 0, are added: here, or by a backward where entries depend on each other.

    Raises:
        TypeError: the step has no derivative, or cannot be recorded.
    """
    try:
        known = _known.get(optimizer)
        found = frozenset(kinds(optimizer, gradients))
        if known is None or known.kind is not type(optimizer):
            known = _Known(type(optimizer), frozenset(), USUAL, 0)
        if not found <= known.kinds or known.is_looked_at_again:
            verified = verify(optimizer, gradients)
            kinds_seen = known.kinds | (found if verified.moves else set())
            num_uses = known.num_uses if found <= known.kinds else 0
            known = _Known(known.kind, kinds_seen, faster(verified), num_uses)
        _known[optimizer] = known._replace(num_uses=known.num_uses + 1)
        if known.how.by_entries and (step := entry_by_entry(optimizer, gradients, known.how)):
            for number in step.nums_cut:
                num_cut += number.to(num_cut.device)
            return differentiable(step, gradients)
        tracked = {key: g for key, g in gradients.items() if g is not None and g.requires_grad}
        is_finite = torch.ones_like(num_cut, dtype=torch.bool)
        cut = _Cut.apply(is_finite, num_cut, *tracked.values())  # type: ignore[no-untyped-call]
        given = {**gradients, **dict(zip(tracked, cut, strict=True))}
        batched = in_batches(optimizer, given, known.how) if known.how.in_batches else None
        parameters = batched or recorded_step(optimizer, given, known.how).parameters
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TypeError(why_not(optimizer, error)) from error
    if tracked:
        looked = _Looked.apply(  # type: ignore[no-untyped-call]
            is_finite, cut[0], *parameters.values()
        )
        parameters = dict(zip(parameters, looked, strict=True))
    return parameters


def faster(verified: Verified) -> How:
    """Recorded so that many parameters go through the step as one, if it is the same."""
    optimizer, leaves, how, ahead, _ = verified
    if ahead.recorder.is_entrywise:
        step = entry_by_entry(optimizer, leaves, how)
        if step and _is_same(ahead, differentiable(step, leaves), leaves, lambda eps: 64 * eps):
            return how._replace(by_entries=True)
    if batched := in_batches(optimizer, leaves, how):
        return how._replace(in_batches=_is_same(ahead, batched, leaves, math.sqrt))
    return how


def _is_same(
    ahead: RecordedStep,
    other: By,
    leaves: Mapping[int, Tensor | None],
    rounding: Callable[[float], float],
) -> bool:
    """Whether values are, and derivatives but for rounding, of so much in that precision."""
    one = ahead.parameters
    if not all(torch.equal(local(new.detach()), local(other[key])) for key, new in one.items()):
        return False
    inputs = [g for g in leaves.values() if g is not None]
    keys = [key for key, new in one.items() if new.requires_grad]
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        shard_like(new, torch.rand(local(new).shape, generator=generator).to(new.device, new.dtype))
        for new in (one[key] for key in keys)
    ]
    found = (
        torch.autograd.grad(
            [step[key] for key in keys],
            inputs,
            cotangents,
            retain_graph=True,  # the first is compared twice
            allow_unused=True,
            materialize_grads=True,
        )
        for step in (one, other)
    )
    for own, new in ((local(a).nan_to_num(0, 0, 0), local(b)) for a, b in zip(*found, strict=True)):
        dtype = torch.float32 if ahead.recorder.is_widened else own.dtype
        if not (own - new).norm() <= rounding(torch.finfo(dtype).eps) * own.norm():
            return False
    return True


class _Cut(torch.autograd.Function):
    """The same gradients; entries of the derivative that are not finite become 0, and are counted.

    Not if what the derivative is asked for is not finite itself: that is for others to see.
    """

    @staticmethod
    def forward(ctx: Any, is_finite: Tensor, num_cut: Tensor, *gradients: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.is_finite, ctx.num_cut, ctx.counted = is_finite, num_cut, torch.zeros_like(num_cut)
        ctx.gradients = [gradient.detach() for gradient in gradients]
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(derivatives, ctx.gradients, strict=True)
        slopes = [torch.zeros_like(g) if slope is None else slope for slope, g in pairs]
        number = torch.zeros_like(ctx.num_cut)
        for members in together(slopes):
            parts = [local(slopes[i]) for i in members]
            part = joined(parts)
            if plainly_finite(part):
                continue
            bad = (part * 0).ne(0) & ctx.is_finite.to(part.device)  # ∞ · 0 is NaN
            number += bad.count_nonzero().to(number.device)
            for i, new in zip(members, parted(torch.where(bad, 0, part), parts), strict=True):
                slopes[i] = shard_like(slopes[i], new)
        ctx.num_cut += number - ctx.counted  # once, if a backward is run again
        ctx.counted.copy_(number)
        return None, None, *slopes


class _Looked(torch.autograd.Function):
    """The same parameters, with a look at what their derivative is asked for.

    A gradient comes first, for there to be a derivative where a step does not depend on any.
    """

    @staticmethod
    def forward(ctx: Any, is_finite: Tensor, gradient: Tensor, *moved: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.is_finite = is_finite
        return tuple(parameter.view_as(parameter) for parameter in moved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        for cotangent in cotangents:
            if cotangent is not None and not plainly_finite(local(cotangent)):
                ctx.is_finite &= (local(cotangent) * 0).sum().eq(0).to(ctx.is_finite.device)
        return None, None, *cotangents
