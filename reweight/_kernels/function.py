"""The kernels as one differentiable function, exact in every order and mode.

Kernels compute values and first derivatives of plain tensors. Whatever asks for more, a graph of
the gradient or a tangent, is answered with plain operations on what is differentiable: the logits,
or their exponentials, which for that are an output of the function. Never on saved statistics:
those would be constants, and what depends on them silently wrong. Transforms of torch.func, which
nest without end, never come here: they get the composite.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reweight._kernels.composite import counted, derivative
from reweight._kernels.implementations import (
    is_plain,
    kernel_backward,
    kernel_forward,
    kernel_tangent,
)

Context: TypeAlias = Any

# Up to so many elements, copying all into one matrix costs less than the calls that it saves.
_SMALL = 2**17
# And from so many on, memory counts.
_LARGE = 2**22
_LOGITS_KEPT: ContextVar[bool] = ContextVar("logits_kept", default=False)


@contextmanager
def logits_kept(kept: bool) -> Iterator[None]:
    """Graphs hold large logits, for others to find there: see ``_passes/primal_cache.py``.

    Else they hold exponentials in place of them, which saves the backward a pass over both.
    """
    token = _LOGITS_KEPT.set(kept)
    try:
        yield
    finally:
        _LOGITS_KEPT.reset(token)


def fused(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, confidence and correctness [N, K].

    The logits are K matrices [N, C_k], or one [K·N, C]; the target is [N] classes, all valid if
    ``ignore_index`` is None.
    """
    some = [torch.is_grad_enabled() and rows.requires_grad for rows in logits]
    large = implementation == "torch" and sum(map(Tensor.numel, logits)) > _LARGE
    if len(logits) > 1 and (large or any(some) != all(some)):
        # One by one, so that the backward can give the memory of each back in its turn, and what
        # needs no gradient keeps nothing for one.
        parts = [
            fused([rows], target, ignore_index, label_smoothing, implementation) for rows in logits
        ]
        losses, confidence, correct = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return losses, confidence, correct
    merge = implementation == "torch" and len(logits) > 1 and _is_small(logits)
    # The exponentials take the place of the logits in memory, unless those are smaller.
    whole = all(rows.dtype in (torch.float32, torch.float64) for rows in logits)
    keep = implementation == "torch" and any(some) and whole and (merge or not _LOGITS_KEPT.get())
    results = ExitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        implementation, keep, merge, ignore_index, label_smoothing, target, *logits
    )
    losses, confidence, correct = (each.view(-1, len(target)).t() for each in results[:3])
    return losses, confidence, correct


class ExitCrossEntropy(torch.autograd.Function):
    """Differentiable in the logits alone; confidence and correctness have no derivative."""

    @staticmethod
    def forward(
        ctx: Context,
        implementation: str,
        keep: bool,
        merge: bool,
        ignore_index: int | None,
        label_smoothing: float,
        target: Tensor,
        *logits: Tensor,
    ) -> tuple[Tensor, ...]:
        """Losses, confidence and correctness, and E = exp(z − m) of all rows if kept.

        All [K, N], or [1, K·N] where the exits are merged, or one matrix already.
        """
        if merge:
            logits = (torch.cat(logits),)
        num_exits = len(logits[0]) // len(target)
        target = target if num_exits == 1 else target.expand(num_exits, -1).flatten()
        losses, confidence, correct, peak, scale, exponentials = kernel_forward(
            implementation, logits, target, ignore_index, label_smoothing, keep
        )
        ctx.mark_non_differentiable(confidence, correct)
        ctx.set_materialize_grads(False)
        ctx.implementation, ctx.rest = implementation, (ignore_index, label_smoothing)
        ctx.keep, ctx.merge, ctx.is_intact, ctx.is_needed = keep, merge, True, False
        ctx.save_for_backward(target, scale, *(exponentials if keep else [peak, *logits]))
        ctx.save_for_forward(target, peak, scale, *logits, *exponentials)
        return losses, confidence, correct, *exponentials

    @staticmethod
    def backward(ctx: Context, upstream: Tensor | None, *others: Tensor | None) -> Any:
        """Upstream → upstream·(p − q) of each exit; dE/dz = E."""
        if not ctx.is_intact:
            raise RuntimeError("A backward that broke off used up the graph of exit_cross_entropy.")
        target, scale, *kept = ctx.saved_tensors
        rest: tuple[int | None, float] = ctx.rest
        peak, sources = (None, kept) if ctx.keep else (kept[0], kept[1:])
        if upstream is None:
            upstream = torch.zeros_like(scale)
        higher = others[2:]  # cotangents of E, where a gradient had a graph
        plain = all(each is None for each in higher) and is_plain(upstream, *sources)
        if torch.is_grad_enabled() or not plain:
            ctx.is_needed = True  # by the graph of the gradient
            slopes = (derivative(z, target, *rest, are_exponentials=ctx.keep) for z in sources)
            gradients = [
                (slope * g.unsqueeze(1)).to(rows.dtype)
                for slope, g, rows in zip(slopes, upstream, sources, strict=True)
            ]
            for k, each in enumerate(higher):
                if each is not None:
                    gradients[k] = gradients[k] + counted(each * sources[k], target, rest[0])
        else:
            in_place = ctx.keep and not ctx.is_needed and not _keeps_graph()
            ctx.is_intact = not in_place
            values = [rows.detach() for rows in sources]
            gradients = kernel_backward(
                ctx.implementation, values, target, *rest, peak, scale, upstream, in_place
            )
        if ctx.merge:
            gradients = list(gradients[0].chunk(len(ctx.needs_input_grad) - 6))
        return *(None,) * 6, *gradients

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """⟨p − q, dz⟩ of each row; dE = E·dz."""
        target, peak, scale, *tensors = ctx.saved_tensors
        num_exits = len(tangents) - 6
        like = tensors[0].chunk(num_exits) if ctx.merge else tensors
        moved = [
            torch.zeros_like(rows) if dz is None else dz
            for rows, dz in zip(like, tangents[6:], strict=False)
        ]
        if ctx.merge:
            moved = [torch.cat(moved)]
        logits, exponentials = tensors[: len(moved)], tensors[len(moved) :]
        rest: tuple[int | None, float] = ctx.rest
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (*logits, *moved))
        if not graph and is_plain(*moved):
            of_losses = kernel_tangent(
                ctx.implementation, logits, target, *rest, peak, scale, moved
            )
        else:
            slopes = (derivative(rows, target, *rest) for rows in logits)
            products = [(slope * dz).sum(1) for slope, dz in zip(slopes, moved, strict=True)]
            of_losses = torch.stack([counted(each, target, rest[0]) for each in products])
        of_exponentials = [e * dz for e, dz in zip(exponentials, moved, strict=ctx.keep)]
        return of_losses, None, None, *of_exponentials


# Whether the graph will be run backward again, which PyTorch tells its own compiler alone.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_small(logits: Sequence[Tensor]) -> bool:
    first = logits[0]
    return len(logits) * first.numel() <= _SMALL and all(
        rows.shape == first.shape and rows.dtype == first.dtype for rows in logits
    )
