"""Operations done again entry by entry, with the derivative of each entry in one other.

This is forward mode where it costs least: ∂θ̂/∂g of a step in which no entry depends on another is
one number for each. It begins as 1, and what all entries have in common stays a number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from reweight._optimizers.operations import ROUNDS_BY_PLACE, Call, Operation, leaves, tensors_in


class OfEach(NamedTuple):
    """Numbers of each parameter, where several go through a step as one.

    Attributes:
        numbers: by name, one for each parameter; of a single one without a dimension.
        parameters: which have as many entries.
        num_dims: of the tensor that the entries are in.
    """

    numbers: Mapping[str, Tensor]
    parameters: Sequence[Tensor]
    num_dims: int

    def spread(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """That of its parameter for each entry, of that type; of a single one to be broadcast."""
        numbers = numbers.to(dtype) if numbers.is_floating_point() else numbers
        if len(self.parameters) > 1:
            each = zip(numbers.unbind(), self.parameters, strict=True)
            numbers = torch.cat([number.expand(p.numel()) for number, p in each])
        return numbers.view(-1, *[1] * (self.num_dims - 1)) if self.num_dims else numbers


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


class _Again(NamedTuple):
    """An operation to be done again.

    Attributes:
        call: with places for what differs.
        args: of its rule.
        named: of its rule, by name.
        rule: what gives the slope; None if there is no rule.
        after: the place of what comes of it.
        spreads: numbers that it needs for each entry: where they are, and where they go.
    """

    call: Call
    args: list[Any]
    named: dict[str, Any]
    rule: _Rule | None
    after: _Place
    spreads: Mapping[Any, _Place]


class Program:
    """What was done to some entries, to be done to others.

    Args:
        calls: as a recorder keeps them; those that the entries play no part in are left out.
        inputs: the entries, that of which the slope is asked for first.
        result: what became of them.
        numbers: what the optimizer holds for each parameter, by name.

    Raises:
        ValueError: entries changed their shape, or met others, or numbers became constants.
    """

    def __init__(
        self,
        calls: Iterable[Call],
        inputs: Sequence[Tensor],
        result: Tensor,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> None:
        numbers = numbers or {}
        self._names, self._calls = list(numbers), list[_Again]()
        places: dict[Any, _Place] = {}
        for i, tensor in enumerate((*inputs, *numbers.values())):
            places[_memory(tensor)] = _Place(i)
        of_each = {places[_memory(tensor)] for tensor in numbers.values()}

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            found = places.get(_memory(value))
            shape = () if found in of_each else result.shape
            if value.dim() and (found is None or value.shape != shape):
                raise ValueError("entries changed their shape, or met others")
            return value if found is None else found

        for call in calls:
            met = {places[m] for m in map(_memory, tensors_in(call.arguments)) if m in places}
            if met & of_each and not (call.results and _takes_several(call.op)):
                raise ValueError("numbers became constants")
            if not (met and call.results):
                continue
            (new,) = call.results
            given = call.with_values(place)
            spreads: dict[Any, _Place] = {}
            for number in met & of_each if met - of_each else ():
                spreads[number] = places.setdefault(("spread", number), _Place(len(places)))
            given = given.with_values(partial(_instead, spreads)) if spreads else given
            after = places.setdefault(_memory(new), _Place(len(places)))
            of_each |= {after} if met <= of_each else set()
            duals, outputs = given.with_values(_constant), dict(call.op.written).values()
            named = {name: x for name, x in duals.named.items() if name not in outputs}
            rule = _RULES.get(call.op.name) if named.keys() <= {"alpha", "value"} else None
            self._calls.append(_Again(given, leaves(duals.values), named, rule, after, spreads))
        self._result, self._dtype = place(result), result.dtype

    @torch.no_grad()
    def __call__(
        self, inputs: Sequence[Tensor], of_each: OfEach | None = None
    ) -> tuple[Tensor, Slope]:
        """The result for these, and its slope."""
        numbers = [of_each.numbers[name] for name in self._names] if of_each else []
        held = {i: _Dual(tensor) for i, tensor in enumerate([*inputs, *numbers])}
        held[0] = _Dual(inputs[0], Slope(1.0))
        for call, args, named, rule, after, spreads in self._calls:
            for number, place in spreads.items():
                if place not in held and of_each:
                    held[place] = _Dual(of_each.spread(held[number].value, self._dtype))
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
    def into(self, inputs: Sequence[Tensor], of_each: OfEach, out: Tensor) -> Slope:
        """The same, the result written to another tensor."""
        value, slope = self(inputs, of_each)
        out.copy_(value)
        return slope


def _takes_several(op: Operation) -> bool:
    """Whether what it does to numbers it does to several at once, and to entries."""
    return (op.is_entrywise or op.name in ROUNDS_BY_PLACE) and op.name != "fill"


def _instead(others: Mapping[Any, _Place], value: Any) -> Any:
    return others.get(value, value) if type(value) is _Place else value


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
