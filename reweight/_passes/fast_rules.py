"""Tangents of operations whose values are known: those alone are computed.

What is linear in a tensor is taken of its tangent; what is not, mostly by the kernel of its
backward, which is symmetric wherever each entry goes its own way. The tangent of BatchNorm is its
backward too: with y = γ·x̂ + β, x̂ = (x − mean) / std per channel,

    ∂y/∂x = γ/std · (I − 1·1ᵀ/n − x̂·x̂ᵀ/n)

is symmetric, so that ẏ = (∂y/∂x)ᵀ·ẋ + γ̇·x̂ + β̇ takes one fused kernel and one pass; LayerNorm's is,
but for γ, symmetric for each sample, and so is the softmax of attention.

A rule takes what is known of the call and its arguments, and gives a dual number, or None where
PyTorch's own forward mode is to run. Dual numbers of a rule end the graph of an inner gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from reweight._passes.memory import tensors_in
from reweight._passes.operations import dual, have_tangents, is_continuous, unpack
from reweight._passes.tangent_rules import embedding

aten = torch.ops.aten
Scalar: TypeAlias = Tensor | float


class Known(NamedTuple):
    """What the same call came to before.

    Attributes:
        value: that; None if it has gone.
        node: of its graph.
        waits: whether the value is memory with nothing in it.
    """

    value: Tensor | None = None
    node: Any = None
    waits: bool = False

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and 1/std of a norm, as its graph holds them; None if it does not, or not alone."""
        if self.value is None or not hasattr(self.node, "_saved_result2"):
            return None
        try:
            return self.node._saved_result1.detach(), self.node._saved_result2.detach()
        except RuntimeError:  # its memory was given away
            return None


Rule: TypeAlias = Callable[..., Tensor | None]


def _dual(value: Tensor, tangent: Tensor) -> Tensor | None:
    """Both in one, unless autocast has made them differ."""
    fits = value.dtype == tangent.dtype and value.shape == tangent.shape
    return dual(value, tangent) if fits else None


def product_rule(product: Callable[..., Tensor]) -> Rule:
    """(input, weight, bias, ...) → input · weight + bias, linear in each."""

    def rule(
        known: Known,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kw: Any,
    ) -> Tensor | None:
        if product is F.linear and not input.is_contiguous():
            # Strided input would take a copy of the weight per sample.
            if known.waits:
                return _in_order_of_memory(rule, input, weight, bias)
            input = input.contiguous()
        (x, dx), (w, dw), (b, db) = map(unpack, (input, weight, bias))
        if dw is None and (dx is None or db is not None):
            return None
        value = product(x, w, b, *args, **kw) if known.value is None else known.value
        tangent = None if dw is None else product(x, dw, db, *args, **kw)
        if dx is None:
            pass
        elif tangent is None:
            tangent = product(dx, w, None, *args, **kw)
        elif product is F.linear and w.dim() == 2 and tangent.dtype == dx.dtype == w.dtype:
            rows = tangent.view(-1, tangent.shape[-1])
            rows.addmm_(dx.reshape(-1, dx.shape[-1]), w.mT)  # without a tensor in between
        else:
            tangent.add_(product(dx, w, None, *args, **kw))
        assert tangent is not None
        return _dual(value, tangent)

    return rule


def _in_order_of_memory(
    rule: Rule, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """A linear layer whose value no one needs: its tangent may lie in memory as the input does."""
    order = sorted(range(input.dim() - 1), key=lambda i: -input.stride(i))
    back = [*map(order.index, range(input.dim() - 1)), input.dim() - 1]
    input = input.permute(*order, input.dim() - 1).contiguous()
    x = unpack(input)[0]
    value = x.new_empty(*x.shape[:-1], len(weight))
    result = rule(Known(value), input, weight, bias)
    return None if result is None else result.permute(back)


def _bilinear(product: Callable[..., Tensor]) -> Rule:
    def rule(known: Known, a: Any, b: Any) -> Tensor | None:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return None
        (x, dx), (y, dy) = unpack(a), unpack(b)
        parts = [] if dx is None else [product(dx, y)]
        parts += [] if dy is None else [product(x, dy)]
        if not parts:
            return None
        value = product(x, y) if known.value is None else known.value
        return _dual(value, parts[0] if len(parts) == 1 else parts[0].add_(parts[1]))

    return rule


def _multiplied(known: Known, input: Any, other: Any) -> Tensor | None:
    (x, dx), (y, dy) = _parts(input), _parts(other)
    if dx is None and dy is None:
        return None
    value = torch.mul(x, y) if known.value is None else known.value
    if dx is not None and dy is not None:
        return _dual(value, torch.mul(dx, y).addcmul_(x, dy))
    return _dual(value, torch.mul(x, dy) if dx is None else torch.mul(dx, y))


def _divided(known: Known, input: Any, other: Any, *, rounding_mode: Any = None) -> Tensor | None:
    (x, dx), (y, dy) = _parts(input), _parts(other)
    if dx is None or dy is not None or rounding_mode is not None:
        return None
    return _dual(x / y if known.value is None else known.value, dx / y)


def _added(sign: int) -> Rule:
    def rule(known: Known, input: Any, other: Any, *, alpha: Any = 1) -> Tensor | None:
        (x, dx), (y, dy) = _parts(input), _parts(other)
        if dx is None and dy is None:
            return None
        value = torch.add(x, y, alpha=sign * alpha) if known.value is None else known.value
        if dx is not None and dy is not None:
            return _dual(value, torch.add(dx, dy, alpha=sign * alpha))
        tangent = dx.expand(value.shape) if dy is None else dy.expand(value.shape) * (sign * alpha)
        return _dual(value, tangent.clone() if dy is None else tangent)

    return rule


def _parts(operand: Any) -> tuple[Any, Any]:
    return unpack(operand) if isinstance(operand, Tensor) else (operand, None)


def _linear(func: Callable[..., Any]) -> Rule:
    """Linear in all its tensors together."""

    def rule(known: Known, *args: Any, **kwargs: Any) -> Tensor | None:
        tensors = tensors_in(args, kwargs)
        if not all(map(is_continuous, tensors)) or not have_tangents(tensors):
            return None
        value = _of_each(_value, func, args, kwargs) if known.value is None else known.value
        tangent = _of_each(_tangent, func, args, kwargs)
        fits = isinstance(value, Tensor) and isinstance(tangent, Tensor)
        return _dual(value, tangent) if fits else None

    return rule


def _of_each(
    part: Callable[[Tensor], Tensor], func: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    args, kwargs = tree_map(lambda t: part(t) if isinstance(t, Tensor) else t, (args, kwargs))
    return func(*args, **kwargs)


def _value(tensor: Tensor) -> Tensor:
    value: Tensor = unpack(tensor)[0]
    return value


def _tangent(tensor: Tensor) -> Tensor:
    value, tangent = unpack(tensor)
    return torch.zeros_like(value) if tangent is None else tangent


def _dropout(
    known: Known, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """The same mask again, for random numbers are drawn by the layout of the memory."""
    (x, dx), value = unpack(input), known.value
    if inplace or value is None or dx is None:
        return None
    if x.stride() != dx.stride():
        dx = torch.empty_like(x).copy_(dx)
    return _dual(value, F.dropout(dx, p, training))


def _by_output(func: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Entry by entry; its backward looks at what it came to."""

    def rule(known: Known, input: Tensor, inplace: bool = False) -> Tensor | None:
        x, dx = unpack(input)
        if inplace or dx is None:
            return None
        y = func(x) if known.value is None else known.value
        return _dual(y, slope(dx, y))

    return rule


def _gelu(known: Known, input: Tensor, approximate: str = "none") -> Tensor | None:
    x, dx = unpack(input)
    if dx is None:
        return None
    y = F.gelu(x, approximate=approximate) if known.value is None else known.value
    return _dual(y, aten.gelu_backward(dx, x, approximate=approximate))


def _silu(known: Known, input: Tensor, inplace: bool = False) -> Tensor | None:
    x, dx = unpack(input)
    if inplace or dx is None:
        return None
    return _dual(F.silu(x) if known.value is None else known.value, aten.silu_backward(dx, x))


def _softmax(
    known: Known, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    x, dx = unpack(input)
    if dx is None or dim is None or args or any(v is not None for v in kwargs.values()):
        return None
    y = torch.softmax(x, dim) if known.value is None else known.value
    return (
        dual(y, aten._softmax_backward_data(dx, y, dim, y.dtype)) if y.dtype == dx.dtype else None
    )


def _batch_norm(
    known: Known,
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
    value, statistics = known.value, known.statistics()
    if value is None or statistics is None:
        value, *statistics = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    mean, inverse = statistics
    tangent = aten.native_batch_norm_backward(
        dx, x, weight, None, None, mean, inverse, training, eps, [True, False, False]
    )[0]
    if dweight is not None:
        # γ̇·x̂ + β̇, by the kernel of the evaluation mode with the statistics of this batch.
        tangent += torch.native_batch_norm(
            x, dweight, dbias, mean, inverse.pow(-2), False, 0.0, 0.0
        )[0]
    return _dual(value, tangent)


def _layer_norm(
    known: Known,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """The same, with statistics of each sample: ẏ = γ·(∂x̂/∂x)ᵀ·ẋ + γ̇·x̂ + β̇."""
    # The kernels take two dtypes, as autocast gives them, forward but not backward.
    if any(each is not None and each.dtype != input.dtype for each in (weight, bias, known.value)):
        return None
    (x, dx), (weight, dweight), (bias, dbias) = map(unpack, (input, weight, bias))
    if dx is None or (dweight is None) != (dbias is None):
        return None
    shape, x, dx = list(normalized_shape), x.contiguous(), dx.contiguous()  # or each kernel does so
    value, statistics = known.value, known.statistics()
    if value is None or statistics is None:
        value, *statistics = torch.native_layer_norm(x, shape, weight, bias, eps)
    mean, inverse = statistics
    tangent = aten.native_layer_norm_backward(
        dx, x, shape, mean, inverse, None, None, [True, False, False]
    )[0]
    if dweight is not None:
        affine = torch.native_layer_norm(x, shape, dweight, dbias, eps)[0]
        tangent = affine.add_(tangent) if weight is None else affine.addcmul_(tangent, weight)
    elif weight is not None:
        tangent *= weight
    return _dual(value, tangent)


def _attention(
    known: Known,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """P·v with P = softmax(s·q·kᵀ), whose tangent is its backward: it is symmetric too."""
    tensors = (query, key, value)
    (q, dq), (k, dk), (v, dv) = map(unpack, tensors)
    device = query.device.type
    special = attn_mask is not None or dropout_p or enable_gqa or torch.is_autocast_enabled(device)
    special = special or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if special or dq is None or dk is None or dv is None:
        with sdpa_kernel(SDPBackend.MATH):  # whatever the model has chosen
            return F.scaled_dot_product_attention(
                *tensors, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    mixed = known.value
    if mixed is None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, dq, k, dk, v, dv = (
        tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, dq, k, dk, v, dv)
    )
    zero = q.new_zeros(())
    scores = torch.baddbmm(zero, q, k.mT, beta=0, alpha=factor)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(later, -torch.inf)
    shares = scores.softmax(-1)
    slope = torch.baddbmm(zero, dq, k.mT, beta=0, alpha=factor).baddbmm_(q, dk.mT, alpha=factor)
    change = aten._softmax_backward_data(slope, shares, -1, shares.dtype)
    tangent = (change @ v).baddbmm_(shares, dv)
    return _dual(mixed, tangent.view_as(mixed))


def _embedding(known: Known, *args: Any, **kwargs: Any) -> Tensor | None:
    return embedding(*args, **kwargs, value=known.value)


def _named(*names: str) -> list[Any]:
    """Functions and methods of these names, where PyTorch has them."""
    places = torch, Tensor, F
    return [getattr(place, name) for place in places for name in names if hasattr(place, name)]


PRODUCTS: tuple[Callable[..., Tensor], ...] = (
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
_threshold = partial(aten.threshold_backward, threshold=0)
_OF_OUTPUT: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys(_named("relu"), _by_output(torch.relu, _threshold)),
    **dict.fromkeys(_named("tanh"), _by_output(torch.tanh, aten.tanh_backward)),
    **dict.fromkeys(_named("sigmoid"), _by_output(torch.sigmoid, aten.sigmoid_backward)),
    **dict.fromkeys(_named("softmax"), _softmax),
}
_OF_TANGENT: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys(_named("add"), _added(1)),
    **dict.fromkeys(_named("sub"), _added(-1)),
    F.dropout: _dropout,
    F.embedding: _embedding,
    **{
        func: _linear(func)
        for func in _named(
            *("mean", "sum", "cat", "concat", "stack", "contiguous", "clone", "reshape", "flatten"),
            *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "float", "to"),
        )
    },
}
FAST_RULES: dict[Callable[..., Any], Rule] = {
    **{product: product_rule(product) for product in PRODUCTS},
    **{product: _bilinear(product) for product in _named("matmul", "mm", "bmm")},
    **dict.fromkeys(_named("mul"), _multiplied),
    **dict.fromkeys(_named("div"), _divided),
    **_OF_OUTPUT,
    **_OF_TANGENT,
    F.gelu: _gelu,
    F.silu: _silu,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
}
BY_OUTPUT, BY_TANGENT = set(_OF_OUTPUT), set(_OF_TANGENT)
"""Functions whose tangents need, of all values, that of the result alone; or none."""
