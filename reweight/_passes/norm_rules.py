"""Tangents of norms and attention, by the fused kernels of their backwards.

The tangent of BatchNorm is its backward: with y = γ·x̂ + β, x̂ = (x − mean) / std per channel,

    ∂y/∂x = γ/std · (I − 1·1ᵀ/n − x̂·x̂ᵀ/n)

is symmetric, so that ẏ = (∂y/∂x)ᵀ·ẋ + γ̇·x̂ + β̇: one kernel for the first term, and the forward's own
with γ̇ and β̇ for the others, which gives the statistics as well. LayerNorm's is, but for γ,
symmetric for each sample, and so is the softmax of attention.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reweight._passes.deferred import Deferred
from reweight._passes.operations import dual, unpack

aten = torch.ops.aten


Rule: TypeAlias = Callable[..., Tensor | None]
"""What the same call came to before, and its arguments → a dual number.

Where it has gone there is None, or what can put it off, if any of the arguments may wait as well.
"""


def completed(
    known: Tensor | Deferred | None,
    tangent: Tensor,
    given: Sequence[Tensor | None],
    compute: Callable[[], Tensor],
) -> Tensor | None:
    """A dual number of this tangent; its value is computed only if it must be."""
    if isinstance(known, Deferred):
        known = known.put_off(tangent, given, compute)
    return fitting(compute() if known is None else known, tangent)


def fitting(value: Tensor, tangent: Tensor) -> Tensor | None:
    """Both in one, unless autocast has made them differ."""
    if value.dtype != tangent.dtype or value.shape != tangent.shape:
        return None
    if value.stride() != tangent.stride():  # PyTorch would fill it with zeros first
        tangent = torch.empty_like(value).copy_(tangent)
    return dual(value, tangent)


def widened(tensor: Any) -> Any:
    """The same in float32, if it is in less, so that only the result is rounded."""
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def batch_norm(
    known: Tensor | Deferred | None,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not training:
        return None
    (x, dx), (weight, dweight), (bias, dbias) = map(unpack, (input, weight, bias))
    if dx is None or (dweight is None) != (dbias is None):
        return None

    # Run in any case: it has the running statistics to move, which the model may read.
    w, b = (weight, bias) if dweight is None else (dweight, dbias)
    value, mean, inverse = torch.native_batch_norm(
        x, w, b, running_mean, running_var, training, momentum, eps
    )
    tangent = aten.native_batch_norm_backward(
        dx, x, weight, None, None, mean, inverse, training, eps, [True, False, False]
    )[0]
    if dweight is None:
        return fitting(value, tangent)

    def compute() -> Tensor:
        return torch.native_batch_norm(x, weight, bias, None, None, training, momentum, eps)[0]

    return completed(known, tangent.add_(value), (x, weight, bias), compute)


def layer_norm(
    known: Tensor | None,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """The same, with statistics of each sample: ẏ = γ·(∂x̂/∂x)ᵀ·ẋ + γ̇·x̂ + β̇."""
    (x, dx), (weight, dweight), (bias, dbias) = map(unpack, (input, weight, bias))
    if dx is None or (dweight is None) != (dbias is None):
        return None
    shape, value, affine = list(normalized_shape), known, None
    mixed = any(each is not None and each.dtype != x.dtype for each in (weight, bias, known))
    if mixed or torch.is_autocast_enabled(x.device.type):
        # The dtype of the value is for autocast to choose; the kernels take two of them forward,
        # but not backward.
        if value is None:
            value = F.layer_norm(x, shape, weight, bias, eps)
        x, dx, weight, dweight, bias, dbias = map(widened, (x, dx, weight, dweight, bias, dbias))
    x = x.contiguous()  # or each kernel does so
    if dweight is not None:  # which gives the statistics too
        affine, mean, inverse = torch.native_layer_norm(x, shape, dweight, dbias, eps)
    if value is None or affine is None:
        plain, mean, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        value = plain if value is None else value
    tangent = aten.native_layer_norm_backward(
        dx, x, shape, mean, inverse, None, None, [True, False, False]
    )[0]
    if affine is not None:
        tangent = affine.add_(tangent) if weight is None else affine.addcmul_(tangent, weight)
    elif weight is not None:
        tangent *= weight
    return fitting(value, tangent.to(value.dtype))


def attention(
    known: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """P·v with P = softmax(s·q·kᵀ + mask), whose derivative is symmetric, as its backward is.

    The value is the fused kernel's; with dropout there is none to be had of the same mask.
    """
    (q, dq), (k, dk), (v, dv) = map(unpack, (query, key, value))
    if dropout_p or unpack(attn_mask)[1] is not None or dq is None or dk is None or dv is None:
        return None
    mixed = known
    if mixed is None:
        mixed = F.scaled_dot_product_attention(
            *(q, k, v, attn_mask), is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled(q.device.type):  # which has rounded what the kernel got
        q, k, v = (each.to(mixed.dtype) for each in (q, k, v))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(mixed.dtype)
    q, dq, k, dk, v, dv = map(widened, (q, dq, k, dk, v, dv))
    if enable_gqa:  # several heads of queries share one of keys and values
        k, dk, v, dv = (
            each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, dk, v, dv)
        )
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, dq, k, dk, v, dv = _matrices([q, dq, k, dk, v, dv], batch)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    zero = q.new_empty(())  # which beta = 0 leaves out
    with torch._C._DisableAutocast():  # three matrices of shares at a time, not more
        shares = torch.baddbmm(zero, q, k.mT, beta=0, alpha=factor)
        if is_causal:
            shares.masked_fill_(_later(shares.shape[-2:], q.device), -torch.inf)
        shares = _shares(shares.view(*batch, *shares.shape[-2:]), attn_mask).view_as(shares)
        change = torch.baddbmm(zero, dq, k.mT, beta=0, alpha=factor)
        change.baddbmm_(q, dk.mT, alpha=factor)
        change = aten._softmax_backward_data(change, shares, -1, shares.dtype)
        tangent = (change @ v).baddbmm_(shares, dv)
    return fitting(mixed, tangent.view(mixed.shape).to(mixed.dtype))


def _matrices(tensors: Sequence[Tensor], batch: Sequence[int]) -> Sequence[Tensor]:
    """Of each [..., T, D] the matrices of the batch, [N, T, D]; one operation copies them all."""
    whole = [each.expand(*batch, *each.shape[-2:]) for each in tensors]
    if len({each.shape for each in whole}) == 1 and not any(map(_lies_in_a_row, whole)):
        return torch.stack(whole).flatten(1, -3).unbind()
    return [each.reshape(-1, *each.shape[-2:]) for each in whole]


def _lies_in_a_row(matrices: Tensor) -> bool:
    """Whether those of the batch are equally far apart."""
    sizes, strides = matrices.shape[:-2], matrices.stride()
    return all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 1))


@functools.lru_cache(maxsize=1)  # for all layers
def _later(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device).triu(1)


def _shares(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of what the mask lets through; a query that may look nowhere takes of nothing."""
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, -torch.inf)
    else:
        scores = scores.add_(mask)
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill_(nowhere, 0)
