"""Tangents of operations whose values are known: those alone are computed.

What is linear in a tensor is taken of its tangent; what is not, mostly by the kernel of its
backward, which is symmetric wherever each entry goes its own way.

A rule takes what the call came to before and its arguments, and gives a dual number, or None where
PyTorch's own forward mode is to run. Dual numbers of a rule end the graph of an inner gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from reweight._passes.deferred import Deferred
from reweight._passes.memory import memory_of, tensors_in
from reweight._passes.norm_rules import (
    Rule,
    attention,
    batch_norm,
    completed,
    fitting,
    layer_norm,
)
from reweight._passes.operations import dual, is_continuous, unpack
from reweight._passes.tangent_rules import embedding

aten = torch.ops.aten


def product_rule(product: Callable[..., Tensor]) -> Rule:
    """(input, weight, bias, ...) → input · weight + bias, linear in each."""

    def rule(
        known: Tensor | Deferred | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kw: Any,
    ) -> Tensor | None:
        (x, dx), (w, dw), (b, db) = map(unpack, (input, weight, bias))
        if dw is None and (dx is None or db is not None):
            return None
        given, strided = (x, w, b), product is F.linear and not x.is_contiguous()

        def compute() -> Tensor:
            if not strided:
                return product(*given, *args, **kw)
            # With a graph it is computed in another way, as in the forward.
            with torch.enable_grad():
                leaves = [_leaf(*each) for each in zip(given, (dx, dw, db), strict=True)]
                return F.linear(*leaves).detach()

        order = _in_memory(x) if strided else None
        if order is not None:
            x, dx = (each if each is None else each.permute(order).contiguous() for each in (x, dx))
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
        if order is not None:
            tangent = tangent.permute([order.index(dim) for dim in range(len(order))])
            if not isinstance(known, Tensor):  # else it is made like what the forward came to
                tangent = tangent.contiguous()
        return completed(known, tangent, given, compute)

    return rule


def _in_memory(tensor: Tensor) -> list[int]:
    """Its dimensions in the order of memory, the last one last."""
    *dims, last = range(tensor.dim())
    return [*sorted(dims, key=tensor.stride, reverse=True), last]


def _leaf(value: Tensor | None, tangent: Tensor | None) -> Any:
    """The value, with a graph of its own if it has a tangent."""
    return None if value is None else value.detach().requires_grad_(tangent is not None)


def _bilinear(product: Callable[..., Tensor]) -> Rule:
    def rule(known: Tensor | None, input: Any, other: Any) -> Tensor | None:
        (x, dx), (y, dy) = map(_parts, (input, other))
        if dx is not None and dy is not None:
            if known is None:
                return None
            return fitting(known, product(dx, y).add_(product(x, dy)))
        value = product(x, y) if known is None else known
        return fitting(value, product(x, dy) if dx is None else product(dx, y))

    return rule


def _divided(
    known: Tensor | None, input: Any, other: Any, *, rounding_mode: Any = None
) -> Tensor | None:
    (x, dx), (y, dy) = map(_parts, (input, other))
    if rounding_mode is not None or (dx is not None and dy is not None):
        return None
    value = x / y if known is None else known
    return fitting(value, dx / y if dy is None else -dy * (value / y))


def _added(sign: int) -> Rule:
    def rule(
        known: Tensor | Deferred | None, input: Any, other: Any, *, alpha: Any = 1
    ) -> Tensor | None:
        (x, dx), (y, dy) = map(_parts, (input, other))
        given = [each for each in (x, y) if isinstance(each, Tensor)]

        def compute() -> Tensor:
            return torch.add(x, y, alpha=sign * alpha)

        if dx is not None and dy is not None:
            if known is None or dx.dtype != dy.dtype:
                return None
            tangent = torch.add(dx, dy, alpha=sign * alpha)
            return completed(known, tangent, given, compute)
        if isinstance(known, Deferred):  # no tangent has its strides
            known.fill(given)
        value = known if isinstance(known, Tensor) else compute()
        if dy is None:
            return fitting(value, dx.expand(value.shape).clone())
        return fitting(value, dy.expand(value.shape) * (sign * alpha))

    return rule


def _parts(operand: Any) -> tuple[Any, Any]:
    return unpack(operand) if isinstance(operand, Tensor) else (operand, None)


def _linear(func: Callable[..., Any]) -> Rule:
    """Linear in all its tensors together."""

    def rule(known: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        tensors = tensors_in(args, kwargs)
        if not all(map(is_continuous, tensors)):
            return None
        args, kwargs = tree_map(
            lambda leaf: _tangent(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        tangent = func(*args, **kwargs)
        if memory_of(tangent) in map(memory_of, tensors_in(args, kwargs)):
            tangent = tangent.clone()  # or it would move with what is written to an argument
        return fitting(known, tangent)

    return rule


def _tangent(tensor: Tensor) -> Tensor:
    value, tangent = unpack(tensor)
    return torch.zeros_like(value) if tangent is None else tangent


def _by_output(slope: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Entry by entry; its backward looks at what it came to."""

    def rule(known: Tensor, input: Tensor, inplace: bool = False) -> Tensor | None:
        return None if inplace else fitting(known, slope(_tangent(input), known))

    return rule


def _gelu(known: Tensor, input: Tensor, approximate: str = "none") -> Tensor | None:
    x, dx = unpack(input)
    return fitting(known, aten.gelu_backward(dx, x, approximate=approximate))


def _silu(known: Tensor, input: Tensor, inplace: bool = False) -> Tensor | None:
    x, dx = unpack(input)
    return None if inplace else fitting(known, aten.silu_backward(dx, x))


def _softmax(
    known: Tensor | None, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    x, dx = unpack(input)
    if dx is None or dim is None or args or any(v is not None for v in kwargs.values()):
        return None
    y = torch.softmax(x, dim) if known is None else known
    return (
        dual(y, aten._softmax_backward_data(dx, y, dim, y.dtype)) if y.dtype == dx.dtype else None
    )


def _embedding(known: Tensor | None, *args: Any, **kwargs: Any) -> Tensor | None:
    return embedding(*args, **kwargs, value=known)


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
_SUMS = {"add": 1, "sub": -1, "subtract": -1}
PUT_OFF = {*PRODUCTS, F.batch_norm, *_named(*_SUMS)}
"""Whose values wait for one to read them, where they have gone."""
_threshold = partial(aten.threshold_backward, threshold=0)
FAST_RULES: dict[Callable[..., Any], Rule] = {
    **{product: product_rule(product) for product in PRODUCTS},
    # PyTorch takes a tensor of zeros for the tangent of a constant, at half a millisecond each.
    **{func: _added(sign) for name, sign in _SUMS.items() for func in _named(name)},
    **dict.fromkeys(_named("mul", "multiply"), _bilinear(torch.mul)),
    **dict.fromkeys(_named("div", "divide", "true_divide"), _divided),
    Tensor.__rdiv__: lambda known, input, other: _divided(known, other, input),
    **dict.fromkeys(_named("softmax"), _softmax),
    F.embedding: _embedding,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.scaled_dot_product_attention: attention,
}
OF_KNOWN: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys(_named("relu"), _by_output(_threshold)),
    **dict.fromkeys(_named("tanh"), _by_output(aten.tanh_backward)),
    **dict.fromkeys(_named("sigmoid"), _by_output(aten.sigmoid_backward)),
    **{product: _bilinear(product) for product in _named("matmul", "mm", "bmm")},
    **{
        func: _linear(func)
        for func in _named(
            *("mean", "sum", "cat", "concat", "stack", "contiguous", "clone", "reshape", "flatten"),
            *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "float", "to"),
        )
    },
    F.gelu: _gelu,
    F.silu: _silu,
}
"""Where PyTorch's forward mode is as good unless the value is known."""
OF_TANGENTS = (OF_KNOWN.keys() | _named(*_SUMS)) - {
    *_named("matmul", "mm", "bmm"),
    F.gelu,
    F.silu,
}
"""What takes nothing of its arguments but their tangents, if the value is known or waits too."""
VIEWS = set(
    _named(
        *("view", "view_as", "reshape", "flatten", "unflatten", "contiguous", "expand", "narrow"),
        *("transpose", "permute", "movedim", "swapaxes", "squeeze", "unsqueeze", "t", "select"),
        *("unbind", "chunk", "split", "tensor_split", "__getitem__", "to", "float"),
    )
) | {getattr(Tensor, name).__get__ for name in ("T", "mT")}
"""What may come to another view of the same memory, and can be done again where it does not."""
RECALLED = FAST_RULES.keys() | OF_KNOWN.keys()
"""What has a rule that can make use of what it came to."""
