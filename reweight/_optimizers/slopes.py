"""Operations done again entry by entry, with the derivative of each entry in one other.

This is forward mode where it costs least: ∂θ̂/∂g of a step in which no entry depends on another is
one number for each. It begins as 1, and what all entries have in common stays a number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reweight._optimizers.operations import Call, leaves, tensors_in


@dataclass(frozen=True)
class Slope:
    """A slope of scale · entries, or of scale for each entry."""

    scale: float = 0.0
    entries: Tensor | None = None

    def __add__(self, other: "Slope") -> "Slope":
        if not self.scale or not other.scale:
            return self if self.scale else other
        if self.entries is other.entries:
            return Slope(self.scale + other.scale, self.entries)
        if self.entries is None:
            return other + self
        share = other.scale / self.scale
        if other.entries is None:
            return Slope(self.scale, self.entries + share)
        return Slope(self.scale, self.entries.add(other.entries, alpha=share))

    def __mul__(self, by: Tensor | float) -> "Slope":
        if not isinstance(by, Tensor):
            return Slope(self.scale * by, self.entries)
        if not self.scale:
            return self
        return Slope(self.scale, by if self.entries is None else self.entries * by)

    def plus(self, other: "Slope", by: Tensor | float) -> "Slope":
        """With so many of another."""
        if not isinstance(by, Tensor) or other.entries is None or not (self.scale and other.scale):
            return self + other * by
        entries = by.new_ones(()) if self.entries is None else self.entries
        product = torch.addcmul(entries, other.entries, by, value=other.scale / self.scale)
        return Slope(self.scale, product)

    def __truediv__(self, by: Tensor | float) -> "Slope":
        if not isinstance(by, Tensor):
            return Slope(self.scale / by, self.entries)
        if not self.scale:
            return self
        return Slope(self.scale, 1 / by if self.entries is None else self.entries / by)


@dataclass(frozen=True)
class _Dual:
    """An argument and its slope."""

    value: Any
    slope: Slope = Slope()


_Rule: TypeAlias = Callable[..., Slope]
_ONE = _Dual(1.0)
# What comes of it and its arguments → its slope. Others, of which there are few, take a backward.
_RULES: Mapping[str, _Rule] = {
    "abs": lambda z, x: x.slope * x.value.sign(),
    "copy": lambda z, x, y, *rest: y.slope,
    "add": lambda z, x, y, alpha=_ONE: x.slope + y.slope * alpha.value,
    "sub": lambda z, x, y, alpha=_ONE: x.slope + y.slope * -alpha.value,
    "mul": lambda z, x, y: (x.slope * y.value).plus(y.slope, x.value),
    "div": lambda z, x, y: x.slope.plus(y.slope * -1.0, z) / y.value,
    "sqrt": lambda z, x: x.slope * 0.5 / z,
    "addcmul": lambda z, x, a, b, value=_ONE: (
        x.slope + (a.slope * b.value).plus(b.slope, a.value) * value.value
    ),
    "addcdiv": lambda z, x, a, b, value=_ONE: (
        x.slope
        + (a.slope.plus(b.slope * -1.0, a.value / b.value) if b.slope.scale else a.slope)
        / b.value
        * value.value
    ),
    "lerp": lambda z, x, y, weight: (
        x.slope * (1 - weight.value)
        + y.slope * weight.value
        + (weight.slope * (y.value - x.value) if weight.slope.scale else Slope())
    ),
    "maximum": lambda z, x, y: _of_larger(x, y),
}


def _of_larger(x: _Dual, y: _Dual) -> Slope:
    side = (x.value - y.value).sign_()  # half of each, if they are equal
    return (x.slope.plus(x.slope, side) + y.slope.plus(y.slope * -1.0, side)) * 0.5


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

        self._calls: list[tuple[Call, list[Any], dict[str, Any], _Rule | None, _Place]] = []
        for call in calls:
            if any(_memory(tensor) in places for tensor in tensors_in(call.arguments)):
                (new,) = call.results
                given = call.with_values(place)
                after = places.setdefault(_memory(new), _Place(len(places)))
                duals, outputs = given.with_values(_constant), dict(call.op.written).values()
                named = {name: x for name, x in duals.named.items() if name not in outputs}
                rule = _RULES.get(call.op.name) if named.keys() <= {"alpha", "value"} else None
                self._calls.append((given, leaves(duals.values), named, rule, after))
        self._result = place(result)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Slope]:
        """The result for these, and its slope."""
        held = {i: _Dual(tensor) for i, tensor in enumerate(inputs)}
        held[0] = _Dual(inputs[0], Slope(1.0))
        for call, args, named, rule, after in self._calls:
            args = [held[x] if type(x) is _Place else x for x in args]
            named = {name: held[x] if type(x) is _Place else x for name, x in named.items()}
            moves = any(x.slope.scale for x in [*args, *named.values()])
            if moves and rule is None:
                held[after] = _by_backward(call, held)
                continue
            (new,) = call.with_values(lambda v: held[v].value if type(v) is _Place else v).again()
            held[after] = _Dual(new, rule(new, *args, **named) if moves and rule else Slope())
        result = held[self._result]
        return result.value, result.slope

    @torch.no_grad()
    def into(self, inputs: Sequence[Tensor], out: Tensor) -> Slope:
        """The same, the result written to another tensor."""
        value, slope = self(inputs)
        out.copy_(value)
        return slope


def _memory(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _constant(value: Any) -> Any:
    """Which a tensor is that arrived for a number."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value.item()
    return value if type(value) is _Place else _Dual(value)


def _by_backward(call: Call, held: Mapping[int, _Dual]) -> _Dual:
    """Σ ∂z/∂x · ẋ."""
    moving = {v: held[v] for v in leaves(call.arguments) if type(v) is _Place}
    inputs = {v: x.value.detach().requires_grad_() for v, x in moving.items() if x.slope.scale}
    with torch.enable_grad():
        values = {v: x.value for v, x in held.items()} | inputs
        (new,) = call.with_values(lambda v: values[v] if type(v) is _Place else v).again()
    slope = Slope()
    if new.requires_grad:
        ones = new.new_ones(()).expand_as(new)
        partials = torch.autograd.grad(
            new, list(inputs.values()), ones, allow_unused=True, materialize_grads=True
        )
        for v, partial in zip(inputs, partials, strict=True):
            slope += moving[v].slope * partial
    return _Dual(new.detach(), slope)
