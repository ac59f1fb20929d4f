"""Operations done again entry by entry, with the derivative of each entry in one other.

This is forward mode where it costs least: ∂θ̂/∂g of a step in which no entry depends on another is
one number for each. It begins as 1, and what all entries have in common stays a number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reweight._optimizers.operations import Call, leaves, tensors_in


class Slope(NamedTuple):
    """A slope of scale · entries, or of scale for each entry."""

    scale: float
    entries: Tensor | None = None


@dataclass
class _Dual:
    """An argument and its slope."""

    value: Any
    slope: Slope = Slope(0.0)


class _Place(int):
    """Stands for what differs from block to block."""


class Program:
    """What was done to some entries, to be done to others.

    Args:
        calls: as a recorder keeps them; those that the entries play no part in are left out.
        inputs: the entries, that of which the slope is asked for first.
        result: what became of them.

    Raises:
        ValueError: they changed their shape, or met others.
    """

    def __init__(self, calls: Iterable[Call], inputs: Sequence[Tensor], result: Tensor) -> None:
        places = {_memory(tensor): _Place(i) for i, tensor in enumerate(inputs)}

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            found = places.get(_memory(value))
            if value.dim() and (found is None or value.shape != result.shape):
                raise ValueError("entries changed their shape, or met others")
            return value if found is None else found

        self._calls: list[tuple[Call, Call, _Place]] = []
        for call in calls:
            if any(_memory(tensor) in places for tensor in tensors_in(call.arguments)):
                (new,) = call.results
                given = call.with_values(place)
                after = places.setdefault(_memory(new), _Place(len(places)))
                self._calls.append((given, given.with_values(_constant), after))
        self._result = place(result)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Slope]:
        """The result for these, and its slope."""
        held = {i: _Dual(tensor) for i, tensor in enumerate(inputs)}
        held[0] = _Dual(inputs[0], Slope(1.0))
        for call, duals, place in self._calls:
            (new,) = call.with_values(lambda v: held[v].value if type(v) is _Place else v).again()
            duals = duals.with_values(lambda v: held[v] if type(v) is _Place else v)
            held[place] = _Dual(new, _slope(duals, new))
        result = held[self._result]
        return result.value, result.slope


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _constant(value: Any) -> Any:
    """Which a tensor is that arrived for a number."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value.item()
    return value if type(value) is _Place else _Dual(value)


def _slope(call: Call, result: Tensor) -> Slope:
    """Of the result of a call on duals."""
    outputs = dict(call.op.written).values()
    args = leaves(call.values)
    named = {name: value for name, value in call.named.items() if name not in outputs}
    moving = {id(x.value): x for x in [*args, *named.values()] if x.slope.scale}
    if not moving:
        return Slope(0.0)
    rule = _RULES.get(call.op.name)
    if rule is not None and named.keys() <= {"alpha", "value"}:
        return rule(result, *args, **named)
    # Any other: Σ ∂z/∂x · ẋ.
    inputs = {key: x.value.detach().requires_grad_() for key, x in moving.items()}
    with torch.enable_grad():
        values = call.with_values(lambda x: inputs.get(id(x.value), x.value))
        new = torch.stack(values.again()).sum()
        partials = [torch.zeros_like(x) for x in inputs.values()]
        if new.requires_grad:
            partials = torch.autograd.grad(new, list(inputs.values()), materialize_grads=True)
    total = Slope(0.0)
    for x, partial in zip(moving.values(), partials, strict=True):
        total = _plus(total, _times(x.slope, partial))
    return total


def _plus(a: Slope, b: Slope, alpha: float = 1.0) -> Slope:
    """a + α·b."""
    b = Slope(alpha * b.scale, b.entries)
    if not a.scale or not b.scale:
        return a if a.scale else b
    if a.entries is b.entries:
        return Slope(a.scale + b.scale, a.entries)
    if a.entries is None:
        a, b = b, a
    assert a.entries is not None
    share = b.scale / a.scale
    entries = a.entries + share if b.entries is None else a.entries.add(b.entries, alpha=share)
    return Slope(a.scale, entries)


def _times(a: Slope, b: Tensor | float) -> Slope:
    if not isinstance(b, Tensor):
        return Slope(a.scale * b, a.entries)
    return a if not a.scale else Slope(a.scale, b if a.entries is None else a.entries * b)


def _over(a: Slope, b: Tensor | float) -> Slope:
    if not isinstance(b, Tensor):
        return Slope(a.scale / b, a.entries)
    return a if not a.scale else Slope(a.scale, 1 / b if a.entries is None else a.entries / b)


def _product(x: _Dual, y: _Dual) -> Slope:
    return _plus(_times(x.slope, y.value), _times(y.slope, x.value))


def _quotient(x: _Dual, y: _Dual, value: Any = None) -> Slope:
    """Of x / y, which has this value."""
    if y.slope.scale and value is None:
        value = x.value / y.value
    return _over(_plus(x.slope, _times(y.slope, value), -1), y.value)


def _between(x: _Dual, y: _Dual, weight: _Dual) -> Slope:
    moved = _plus(_times(x.slope, 1 - weight.value), _times(y.slope, weight.value))
    if weight.slope.scale:
        moved = _plus(moved, _times(weight.slope, y.value - x.value))
    return moved


_ONE = _Dual(1.0)
_RULES: Mapping[str, Callable[..., Slope]] = {
    "zero": lambda z, x: Slope(0.0),
    "copy": lambda z, x, y, *rest: y.slope,
    "add": lambda z, x, y, alpha=_ONE: _plus(x.slope, y.slope, alpha.value),
    "sub": lambda z, x, y, alpha=_ONE: _plus(x.slope, y.slope, -alpha.value),
    "mul": lambda z, x, y: _product(x, y),
    "div": lambda z, x, y: _quotient(x, y, z),
    "sqrt": lambda z, x: _over(_times(x.slope, 0.5), z),
    "addcmul": lambda z, x, a, b, value=_ONE: _plus(x.slope, _product(a, b), value.value),
    "addcdiv": lambda z, x, a, b, value=_ONE: _plus(x.slope, _quotient(a, b), value.value),
    "lerp": lambda z, x, y, weight: _between(x, y, weight),
}
