"""Cross-entropy of exits that share a vocabulary head, with never all logits in memory.

Rows of all exits of a chunk share one product with the head. The backward multiplies again what the
forward did not keep: 4 products of size N·K·D·V in all, against 3 and the logits' memory.

With z = cap(h·Wᵀ + b), p = softmax(z) and q the target's distribution there are two results with
derivatives, the loss l and the logarithm of the normaliser, s = log Σ exp z::

    ∂l/∂z = p − q      ∂s/∂z = p      upstream g of l, h of s:  (g + h)·(p − q) + h·q
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reweight._kernels import composite
from reweight._kernels.composite import counted, derivative
from reweight._kernels.dispatch import choose_linear, is_traced
from reweight._kernels.implementations import is_plain, kernel_backward, kernel_forward

Context: TypeAlias = Any

# Rows of logits in memory at a time: enough for a matrix product at full speed.
_CHUNK = 256


def linear_cross_entropy(
    hidden: Sequence[Tensor],
    head: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, confidence, correctness and log Σ exp z, [N, K], of K matrices [N, D].

    The head is its weight [V, D] and, where it has one, its bias [V].
    """
    weight, bias = head[0], head[1] if len(head) > 1 else None
    if is_traced():
        logits = [_logits(each, weight, bias, softcap) for each in hidden]
        results = composite.forward(logits, target, ignore_index, label_smoothing)
        sums = [each.logsumexp(1).to(results[0].dtype) for each in logits]
        return *results, counted(torch.stack(sums, 1), target, ignore_index)
    implementation = choose_linear(hidden)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = LinearExitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        implementation, ignore_index, label_smoothing, softcap, target, weight, bias, *hidden
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
        softcap: float | None,
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        """The results [N, K]; keeps two numbers for each row of logits."""
        ctx.implementation, ctx.softcap = implementation, softcap
        ctx.rest = ignore_index, label_smoothing
        parts = []
        buffer = _buffer(hidden, weight)
        for _, rows, repeated in _chunks(hidden, target):
            logits = _logits_into(buffer, rows, weight, bias, softcap)
            *results, _, _ = kernel_forward(
                implementation, [logits], repeated, ignore_index, label_smoothing, keep=False
            )
            parts.append([each.view(len(hidden), -1).t() for each in results])
        losses, confidence, correct, peak = (torch.cat(part) for part in zip(*parts, strict=True))
        normaliser = counted(peak - confidence.log(), target, ignore_index)
        ctx.mark_non_differentiable(confidence, correct)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(peak, confidence, target, weight, bias, *hidden)
        ctx.save_for_forward(target, weight, bias, *hidden)
        return losses, confidence, correct, normaliser

    @staticmethod
    def backward(
        ctx: Context, of_losses: Tensor | None, _: None, __: None, of_normaliser: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """With d the logits' gradient, by chunks: d·W for each row, Σ dᵀ·h and Σ d in float32."""
        peak, confidence, target, weight, bias, *hidden = ctx.saved_tensors
        given = [each for each in (of_losses, of_normaliser) if each is not None]
        if not given:
            return (None,) * (7 + len(hidden))
        upstream = sum(given[1:], given[0])  # of p; and of −q those of the losses alone
        inputs = [each for each in (upstream, weight, bias, *hidden) if each is not None]
        plain = not torch.is_grad_enabled() and is_plain(*inputs)
        to_weight, to_bias, *to_hidden = ctx.needs_input_grad[5:]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for_weight = torch.zeros_like(weight, dtype=dtype) if to_weight else None
        for_bias = torch.zeros_like(bias, dtype=dtype) if to_bias else None
        rest: tuple[int | None, float] = ctx.rest
        buffer = _buffer(hidden, weight) if plain else None
        parts = []
        for chunk, rows, repeated in _chunks(hidden, target):
            g = upstream[chunk].t().reshape(-1, 1)
            h = None if of_normaliser is None else of_normaliser[chunk].t().reshape(-1, 1)
            if buffer is not None:
                logits = _logits_into(buffer, rows, weight, bias, ctx.softcap)
                bend = None if ctx.softcap is None else _bend(logits, ctx.softcap)
                m, c = (each[chunk].t().reshape(1, -1) for each in (peak, confidence))
                # Of these logits only the exponentials are needed: in place, they take no memory.
                in_place = ctx.implementation == "torch" and logits.dtype == dtype
                if in_place:
                    logits.sub_(m.t()).exp_()
                peaks = None if in_place else m
                arguments = ctx.implementation, [logits], repeated, *rest
                (d,) = kernel_backward(*arguments, peaks, c, g.t(), in_place)
                if h is not None:
                    d = _with_target(d, repeated, rest, h)
                if bend is not None:
                    d *= bend
            else:
                logits = _logits(rows, weight, bias, ctx.softcap)
                d = derivative(logits, repeated, *rest) * g
                if h is not None:
                    d = _with_target(d, repeated, rest, h)
                if ctx.softcap is not None:
                    d = d * _bend(logits, ctx.softcap)
                d = d.to(logits.dtype)
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
            *(None,) * 5,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None else for_bias.to(bias.dtype),
            *(for_hidden or [None] * len(hidden)),
        )

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """⟨p − q, dz⟩ and ⟨p, dz⟩ of each row, dz = dh·Wᵀ + h·dWᵀ + db but for the cap's slope."""
        target, weight, bias, *hidden = ctx.saved_tensors
        d_weight, d_bias, *d_hidden = tangents[5:]
        moved = [
            torch.zeros_like(h) if d is None else d for h, d in zip(hidden, d_hidden, strict=True)
        ]
        rest: tuple[int | None, float] = ctx.rest
        parts = []
        for chunk, rows, repeated in _chunks(hidden, target):
            dz = torch.cat([each[chunk] for each in moved]) @ weight.t()
            if d_weight is not None:
                dz = dz + rows @ d_weight.t()
            if d_bias is not None:
                dz = dz + d_bias
            logits = _logits(rows, weight, bias, ctx.softcap)
            if ctx.softcap is not None:
                dz = dz * _bend(logits, ctx.softcap)
            slope = derivative(logits, repeated, *rest)
            of_losses = (slope * dz).sum(1)
            of_normaliser = of_losses + _at_target(dz, repeated, rest)
            both = (counted(each, repeated, rest[0]) for each in (of_losses, of_normaliser))
            parts.append([each.view(len(hidden), -1).t() for each in both])
        losses, normaliser = (torch.cat(part) for part in zip(*parts, strict=True))
        return losses, None, None, normaliser


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


def _logits_into(
    buffer: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    out = buffer[: len(rows)]
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [N, V], differentiable: softcap·tanh(z / softcap) of z = rows·Wᵀ + b."""
    logits = F.linear(rows, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _bend(logits: Tensor, softcap: float) -> Tensor:
    """The cap's slope, from the capped logits."""
    return 1 - (logits / softcap) ** 2


def _at_target(rows: Tensor, target: Tensor, rest: tuple[int | None, float]) -> Tensor:
    """⟨q, row⟩ of each row, [N], by looking it up; anything where the target is ignored."""
    ignore_index, label_smoothing = rest
    index = counted(target, target, ignore_index, 0).unsqueeze(1)
    found = (1 - label_smoothing) * rows.gather(1, index).squeeze(1)
    return found + label_smoothing * rows.mean(1) if label_smoothing else found


def _with_target(d: Tensor, target: Tensor, rest: tuple[int | None, float], h: Tensor) -> Tensor:
    """The rows d + h·q [N, V], differentiable, of h [N, 1]."""
    ignore_index, label_smoothing = rest
    h = counted(h, target, ignore_index).to(d.dtype)
    index = counted(target, target, ignore_index, 0).unsqueeze(1)
    d = d.scatter_add(1, index, (1 - label_smoothing) * h)
    return d + label_smoothing / d.shape[1] * h if label_smoothing else d
