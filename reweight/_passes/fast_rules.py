"""Tangents of operations whose values are known: those alone are computed.

What is linear in a tensor is taken of its tangent; what is not, mostly by the kernel of its
backward, which is symmetric wherever each entry goes its own way.

A rule takes what is known of the call and its arguments, and gives a dual number, or None where
PyTorch's own forward mode is to run. Dual numbers of a rule end the graph of an inner gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from reweight._passes.memory import tensors_in
from reweight._passes.norm_rules import Known, Rule, attention, batch_norm, fitting, layer_norm
from reweight._passes.operations import dual, have_tangents, is_continuous, unpack
from reweight._passes.tangent_rules import embedding

aten = torch.ops.aten


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
        return fitting(value, tangent)

    return rule


def _in_order_of_memory(
    rule: Rule, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """A linear layer whose value no one needs: its tangent may lie in memory as the input does."""
    strides = input.stride()
    order = sorted(range(input.dim() - 1), key=lambda i: -strides[i])
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
        return fitting(value, parts[0] if len(parts) == 1 else parts[0].add_(parts[1]))

    return rule


def _multiplied(known: Known, input: Any, other: Any) -> Tensor | None:
    (x, dx), (y, dy) = _parts(input), _parts(other)
    if dx is None and dy is None:
        return None
    value = torch.mul(x, y) if known.value is None else known.value
    if dx is not None and dy is not None:
        return fitting(value, torch.mul(dx, y).addcmul_(x, dy))
    return fitting(value, torch.mul(x, dy) if dx is None else torch.mul(dx, y))


def _divided(known: Known, input: Any, other: Any, *, rounding_mode: Any = None) -> Tensor | None:
    (x, dx), (y, dy) = _parts(input), _parts(other)
    if dx is None or dy is not None or rounding_mode is not None:
        return None
    return fitting(x / y if known.value is None else known.value, dx / y)


def _added(sign: int) -> Rule:
    def rule(known: Known, input: Any, other: Any, *, alpha: Any = 1) -> Tensor | None:
        (x, dx), (y, dy) = _parts(input), _parts(other)
        if dx is None and dy is None:
            return None
        value = torch.add(x, y, alpha=sign * alpha) if known.value is None else known.value
        if dx is not None and dy is not None:
            return fitting(value, torch.add(dx, dy, alpha=sign * alpha))
        tangent = dx.expand(value.shape) if dy is None else dy.expand(value.shape) * (sign * alpha)
        return fitting(value, tangent.clone() if dy is None else tangent)

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
        return fitting(value, tangent) if fits else None

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
    return fitting(value, F.dropout(dx, p, training))


def _by_output(func: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Entry by entry; its backward looks at what it came to."""

    def rule(known: Known, input: Tensor, inplace: bool = False) -> Tensor | None:
        x, dx = unpack(input)
        if inplace or dx is None:
            return None
        y = func(x) if known.value is None else known.value
        return fitting(y, slope(dx, y))

    return rule


def _gelu(known: Known, input: Tensor, approximate: str = "none") -> Tensor | None:
    x, dx = unpack(input)
    if dx is None:
        return None
    y = F.gelu(x, approximate=approximate) if known.value is None else known.value
    return fitting(y, aten.gelu_backward(dx, x, approximate=approximate))


def _silu(known: Known, input: Tensor, inplace: bool = False) -> Tensor | None:
    x, dx = unpack(input)
    if inplace or dx is None:
        return None
    return fitting(F.silu(x) if known.value is None else known.value, aten.silu_backward(dx, x))


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
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.scaled_dot_product_attention: attention,
}
BY_OUTPUT, BY_TANGENT = set(_OF_OUTPUT), set(_OF_TANGENT)
"""Functions whose tangents need, of all values, that of the result alone; or none."""
