"""Cross-entropy of exits that share a vocabulary head, with never all logits in memory.

Rows of all exits of a chunk share one product with the head. The backward multiplies again what the
forward did not keep: 4 products of size N·K·D·V in all, against 3 and the logits' memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reweight._kernels.composite import counted, derivative
from reweight._kernels.function import is_plain, kernel_backward, kernel_forward

Context: TypeAlias = Any

# Rows of logits in memory at a time: enough for a matrix product at full speed.
_CHUNK = 256


def fused_linear(
    hidden: Sequence[Tensor],
    head: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, confidence and correctness [N, K] of K matrices [N, D].

    The head is its weight [V, D] and, where it has one, its bias [V].
    """
    weight, bias = (*head, None)[:2]
    result: tuple[Tensor, Tensor, Tensor] = LinearExitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        implementation, ignore_index, label_smoothing, target, weight, bias, *hidden
    )
    return result


class LinearExitCrossEntropy(torch.autograd.Function):
    """Differentiable in the hidden states, the weight and the bias of the head."""

    @staticmethod
    def forward(
        ctx: Context,
        implementation: str,
        ignore_index: int | None,
        label_smoothing: float,
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        """Losses, confidence and correctness [N, K]; keeps two numbers for each row of logits."""
        ctx.implementation, ctx.rest = implementation, (ignore_index, label_smoothing)
        parts = []
        buffer = _buffer(hidden, weight)
        for _, rows, repeated in _chunks(hidden, target):
            logits = _logits_into(buffer, rows, weight, bias)
            *results, _ = kernel_forward(
                implementation, [logits], repeated, ignore_index, label_smoothing, keep=False
            )
            parts.append([each.view(len(hidden), -1).t() for each in results])
        losses, confidence, correct, peak = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(confidence, correct)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(peak, confidence, target, weight, bias, *hidden)
        ctx.save_for_forward(target, weight, bias, *hidden)
        return losses, confidence, correct

    @staticmethod
    def backward(ctx: Context, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """With d = upstream·(p − q), by chunks: d·W for each row, Σ dᵀ·h and Σ d in float32."""
        peak, confidence, target, weight, bias, *hidden = ctx.saved_tensors
        if upstream is None:
            return (None,) * (6 + len(hidden))
        inputs = [each for each in (upstream, weight, bias, *hidden) if each is not None]
        plain = not torch.is_grad_enabled() and is_plain(*inputs)
        to_weight, to_bias, *to_hidden = ctx.needs_input_grad[4:]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for_weight = torch.zeros_like(weight, dtype=dtype) if to_weight else None
        for_bias = torch.zeros_like(bias, dtype=dtype) if to_bias else None
        rest: tuple[int | None, float] = ctx.rest
        buffer = _buffer(hidden, weight) if plain else None
        parts = []
        for chunk, rows, repeated in _chunks(hidden, target):
            g = upstream[chunk].t().reshape(-1)
            if buffer is not None:
                logits = _logits_into(buffer, rows, weight, bias)
                m, c = (each[chunk].t().reshape(1, -1) for each in (peak, confidence))
                # Of these logits only the exponentials are needed: in place, they take no memory.
                in_place = ctx.implementation == "torch" and logits.dtype == dtype
                if in_place:
                    logits.sub_(m.t()).exp_()
                peaks = None if in_place else m
                arguments = ctx.implementation, [logits], repeated, *rest
                (d,) = kernel_backward(*arguments, peaks, c, g.unsqueeze(0), in_place)
            else:
                logits = F.linear(rows, weight, bias)
                d = (derivative(logits, repeated, *rest) * g.unsqueeze(1)).to(logits.dtype)
            if any(to_hidden):
                parts.append((d @ weight).chunk(len(hidden)))
            if for_bias is not None:
                for_bias = for_bias + d.sum(0, dtype=dtype)
            if for_weight is None:
                continue
            if not plain:
                for_weight = for_weight + d.t() @ rows
            elif d.dtype == dtype:  # with no second tensor of the size of the weight
                torch.addmm(for_weight, d.t(), rows, out=for_weight)
            else:
                for_weight += d.t() @ rows
        for_hidden: list[Tensor | None] = [torch.cat(part) for part in zip(*parts, strict=True)]
        return (
            *(None,) * 4,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None else for_bias.to(bias.dtype),
            *(for_hidden or [None] * len(hidden)),
        )

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """⟨p − q, dz⟩ for each row, with dz = dh·Wᵀ + h·dWᵀ + db."""
        target, weight, bias, *hidden = ctx.saved_tensors
        d_weight, d_bias, *d_hidden = tangents[4:]
        moved = [
            torch.zeros_like(h) if d is None else d for h, d in zip(hidden, d_hidden, strict=True)
        ]
        products = []
        for chunk, rows, repeated in _chunks(hidden, target):
            dz = torch.cat([each[chunk] for each in moved]) @ weight.t()
            if d_weight is not None:
                dz = dz + rows @ d_weight.t()
            if d_bias is not None:
                dz = dz + d_bias
            logits = F.linear(rows, weight, bias)
            slope = derivative(logits, repeated, *ctx.rest)
            product = counted((slope * dz).sum(1), repeated, ctx.rest[0])
            products.append(product.view(len(hidden), -1).t())
        return torch.cat(products), None, None


def _chunks(hidden: Sequence[Tensor], target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some samples at a time: which, their rows of all exits [K·n, D], and the targets of those."""
    num_samples = _num_samples(hidden)
    for start in range(0, len(target), num_samples):
        chunk = slice(start, start + num_samples)
        rows = torch.cat([each[chunk] for each in hidden])
        yield chunk, rows, target[chunk].repeat(len(hidden))


def _num_samples(hidden: Sequence[Tensor]) -> int:
    return max(1, _CHUNK // len(hidden))


def _buffer(hidden: Sequence[Tensor], weight: Tensor) -> Tensor:
    """For the logits of one chunk after the other: fresh memory for each would cost time."""
    num_rows = len(hidden) * min(len(hidden[0]), _num_samples(hidden))
    return weight.new_empty(num_rows, len(weight))


def _logits_into(buffer: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = buffer[: len(rows)]
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)
