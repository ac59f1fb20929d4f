"""Tangents of operations for which PyTorch has no forward rule, or one unlike its backward.

They cost less than the backward's derivative: what is linear in a tensor is taken of its tangent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from reweight._passes.memory import is_plain
from reweight._passes.operations import dual, unpack


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    value: Tensor | None = None,
) -> Tensor | None:
    """As its backward does it: nothing of the padding's row, and less of rows that are frequent."""
    if max_norm is not None or weight.requires_grad:
        return None
    (weight, dweight), tokens = unpack(weight), input
    if dweight is None:
        return None
    value = F.embedding(tokens, weight) if value is None else value
    tangent = F.embedding(tokens, dweight)
    if padding_idx is not None:
        tangent = tangent.masked_fill((tokens == padding_idx % len(weight)).unsqueeze(-1), 0)
    if scale_grad_by_freq:
        counts = torch.zeros(len(weight), dtype=tangent.dtype, device=tokens.device)
        counts.index_add_(
            0, tokens.flatten(), torch.ones_like(tokens.flatten(), dtype=counts.dtype)
        )
        tangent = tangent / counts[tokens].unsqueeze(-1)
    return dual(value, tangent)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Bilinear in the rows and their weights, unless the largest are taken."""
    special = max_norm is not None or scale_grad_by_freq or mode == "max" or weight.requires_grad
    if special or (per_sample_weights is not None and per_sample_weights.requires_grad):
        return None
    (weight, dweight), (factors, dfactors) = unpack(weight), unpack(per_sample_weights)

    def bag(weight: Tensor, factors: Tensor | None) -> Tensor:
        return F.embedding_bag(
            input,
            weight,
            offsets,
            mode=mode,
            per_sample_weights=factors,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )

    parts = [] if dweight is None else [bag(dweight, factors)]
    parts += [] if dfactors is None else [bag(weight, dfactors)]
    return dual(bag(weight, factors), sum(parts[1:], parts[0])) if parts else None


def _grouped_product(product: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """Bilinear in its first two arguments: a product for each expert of a mixture."""

    def rule(
        mat_a: Tensor, mat_b: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        if bias is not None or mat_a.requires_grad or mat_b.requires_grad:
            return None
        (a, da), (b, db) = unpack(mat_a), unpack(mat_b)
        parts = [] if da is None else [product(da, b, *args, **kwargs)]
        parts += [] if db is None else [product(a, db, *args, **kwargs)]
        value = product(a, b, *args, **kwargs)
        return dual(value, sum(parts[1:], parts[0])) if parts else None

    return rule


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor | None:
    """v·g / ‖v‖, whose norms are of all dimensions but one."""
    if v.requires_grad or g.requires_grad:
        return None
    tangent = unpack(v * (g / torch.norm_except_dim(v, 2, dim)))[1]
    value = torch._weight_norm(unpack(v)[0], unpack(g)[0], dim)
    return None if tangent is None else dual(value, tangent)


def _lstm(input: Tensor, state: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...] | None:
    """The kernel of oneDNN has no forward rule: its values, and tangents by the other kernel.

    With random numbers it is left to its backward, for they are to be drawn once.
    """
    if isinstance(state, Tensor):  # a packed sequence, which that kernel does not take
        return None
    _, _, dropout, train, *_ = rest
    tensors = (input, *state, *weights)
    elsewhere = input.dtype == torch.float64 or any(
        not is_plain(t) or t.device.type != "cpu" for t in tensors
    )
    if elsewhere or (dropout and train) or any(t.requires_grad for t in tensors):
        return None
    if not torch._C._get_mkldnn_enabled():
        return None
    input_value, state_values, weight_values = tree_map(
        lambda t: unpack(t)[0], (input, list(state), list(weights))
    )
    values = torch.lstm(input_value, state_values, weight_values, *rest)
    torch._C._set_mkldnn_enabled(False)
    try:
        duals = torch.lstm(input, state, weights, *rest)
    finally:
        torch._C._set_mkldnn_enabled(True)
    tangents = (unpack(each)[1] for each in duals)
    pairs = zip(values, tangents, strict=True)
    return tuple(value if tangent is None else dual(value, tangent) for value, tangent in pairs)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: embedding,
    F.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,
    torch.lstm: _lstm,
    **{
        product: _grouped_product(product)
        for product in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))
        if product is not None
    },
}
