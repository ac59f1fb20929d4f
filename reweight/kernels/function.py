"""The kernels as one differentiable function, exact in every order and mode.

Kernels compute values and first derivatives of plain tensors. Whatever asks for more, a graph of
the gradient or a tangent, is answered with plain operations on what is differentiable: the logits,
or their exponentials, which for that are an output of the function. Never on saved statistics:
those would be constants, and what depends on them silently wrong. Transforms of torch.func, which
nest without end, never come here: they get the composite.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from reweight.kernels import torch_kernels
from reweight.kernels.composite import counted, derivative

Context: TypeAlias = Any

# Up to so many elements, copying all into one matrix costs less than the calls that it saves.
_SMALL = 2**17
# And from so many on, memory counts.
_LARGE = 2**22
_NO_CLASS = -1


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
    if implementation == "torch" and len(logits) > 1 and sum(map(Tensor.numel, logits)) > _LARGE:
        # One by one, so that the backward can give the memory of each back in its turn.
        parts = [
            fused([rows], target, ignore_index, label_smoothing, implementation) for rows in logits
        ]
        losses, confidence, correct = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return losses, confidence, correct
    # The exponentials take the place of the logits in memory, unless those are smaller.
    keep = (
        implementation == "torch"
        and all(rows.dtype in (torch.float32, torch.float64) for rows in logits)
        and torch.is_grad_enabled()
        and any(rows.requires_grad for rows in logits)
    )
    losses, confidence, correct, *_ = ExitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        implementation, keep, ignore_index, label_smoothing, target, *logits
    )
    return losses, confidence, correct


class ExitCrossEntropy(torch.autograd.Function):
    """Differentiable in the logits alone; confidence and correctness have no derivative."""

    @staticmethod
    def forward(
        ctx: Context,
        implementation: str,
        keep: bool,
        ignore_index: int | None,
        label_smoothing: float,
        target: Tensor,
        *logits: Tensor,
    ) -> tuple[Tensor, ...]:
        """Losses, confidence and correctness [N, K], and E = exp(z − m) of all rows if kept."""
        merge = implementation == "torch" and len(logits) > 1 and _is_small(logits)
        matrices = [torch.cat(logits)] if merge else logits
        *results, peak, exponentials = kernel_forward(
            implementation,
            matrices,
            _for_rows(target, matrices),
            ignore_index,
            label_smoothing,
            keep,
        )
        losses, confidence, correct = (each.view(-1, len(target)).t() for each in results)
        ctx.mark_non_differentiable(confidence, correct)
        ctx.set_materialize_grads(False)
        ctx.implementation, ctx.rest = implementation, (ignore_index, label_smoothing)
        ctx.num_exits, ctx.keep = len(logits), keep
        kept = exponentials if keep else [peak, *logits]
        ctx.save_for_backward(target, results[1], *kept)
        ctx.save_for_forward(target, *logits, *exponentials)
        return losses, confidence, correct, *exponentials

    @staticmethod
    def backward(ctx: Context, upstream: Tensor | None, *others: Tensor | None) -> Any:
        """Upstream [N, K] → upstream·(p − q) of each exit; dE/dz = E."""
        target, confidence, *kept = ctx.saved_tensors
        rest: tuple[int | None, float] = ctx.rest
        peak, sources = (None, kept) if ctx.keep else (kept[0].view(len(kept) - 1, -1), kept[1:])
        confidence = confidence.view(len(sources), -1)
        classes = _for_rows(target, sources)
        if upstream is None:
            upstream = torch.zeros_like(confidence).view(-1, len(target)).t()
        g = upstream.t().reshape(len(sources), -1)
        higher = others[2:]  # cotangents of E, where a gradient had a graph
        plain = all(each is None for each in higher) and is_plain(upstream, *sources)
        if torch.is_grad_enabled() or not plain:
            slopes = (derivative(z, classes, *rest, are_exponentials=ctx.keep) for z in sources)
            gradients = [
                (slope * each.unsqueeze(1)).to(rows.dtype)
                for slope, each, rows in zip(slopes, g, sources, strict=True)
            ]
            for k, each in enumerate(higher):
                if each is not None:
                    gradients[k] = gradients[k] + counted(each * sources[k], classes, rest[0])
        else:
            in_place = ctx.keep and not torch._C._autograd._get_current_graph_task_keep_graph()
            gradients = kernel_backward(
                ctx.implementation,
                [rows.detach() for rows in sources],
                classes,
                *rest,
                peak,
                confidence,
                g,
                in_place,
            )
        merged = len(gradients) < ctx.num_exits
        return *(None,) * 5, *(gradients[0].chunk(ctx.num_exits) if merged else gradients)

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """⟨p − q, dz⟩ of each row; dE = E·dz."""
        target, *tensors = ctx.saved_tensors
        logits, exponentials = tensors[: ctx.num_exits], tensors[ctx.num_exits :]
        classes = _for_rows(target, logits)
        moved = [
            torch.zeros_like(rows) if dz is None else dz
            for rows, dz in zip(logits, tangents[5:], strict=True)
        ]
        slopes = (derivative(rows, classes, *ctx.rest) for rows in logits)
        products = [(slope * dz).sum(1) for slope, dz in zip(slopes, moved, strict=True)]
        of_losses = torch.stack([counted(each, classes, ctx.rest[0]) for each in products])
        if len(exponentials) == 1:
            moved = [torch.cat(moved)]
        of_exponentials = [each * dz for each, dz in zip(exponentials, moved, strict=False)]
        return of_losses.view(-1, len(target)).t(), None, None, *of_exponentials


def kernel_forward(
    implementation: str,
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Losses, confidence, correctness, peak [K, N]; exponentials, of "torch" alone, if kept."""
    if implementation == "torch":
        return torch_kernels.forward(logits, target, ignore_index, label_smoothing, keep)
    from reweight.kernels import triton_kernels

    ignored = _NO_CLASS if ignore_index is None else ignore_index
    return *triton_kernels.forward(logits, target, ignored, label_smoothing), []


def kernel_backward(
    implementation: str,
    sources: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    peak: Tensor | None,
    confidence: Tensor,
    upstream: Tensor,
    in_place: bool,
) -> list[Tensor]:
    """upstream·(p − q) of each exit; see the kernels for the arguments."""
    if implementation == "torch":
        return torch_kernels.backward(
            sources, target, ignore_index, label_smoothing, peak, confidence, upstream, in_place
        )
    from reweight.kernels import triton_kernels

    assert peak is not None
    ignored = _NO_CLASS if ignore_index is None else ignore_index
    return triton_kernels.backward(
        sources, target, ignored, label_smoothing, peak, confidence, upstream
    )


def is_plain(*tensors: Tensor) -> bool:
    """Whether values are all there is to these tensors: no tangent, no transform around them."""
    return not torch._C._are_functorch_transforms_active() and not any(
        torch._C._functorch.is_legacy_batchedtensor(tensor)  # autograd.grad(is_grads_batched=True)
        or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def _is_small(logits: Sequence[Tensor]) -> bool:
    first = logits[0]
    return len(logits) * first.numel() <= _SMALL and all(
        rows.shape == first.shape and rows.dtype == first.dtype for rows in logits
    )


def _for_rows(target: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The target of each row, where one matrix holds the rows of several exits too."""
    num_exits = len(matrices[0]) // len(target)
    return target if num_exits == 1 else target.expand(num_exits, -1).flatten()
