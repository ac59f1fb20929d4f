"""Operations: what their schemas say, and what they come to without writing anything."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import SymFloat, Tensor
from torch._ops import OpOverload, OpOverloadPacket

from reweight._optimizers.scalars import Refused, valued

aten = torch.ops.aten

LOW = (torch.bfloat16, torch.float16)
SIGNS = frozenset({"sign", "sgn", "round", "floor", "ceil", "trunc", "heaviside"})
"""Their derivative is 0, where they have one."""
_OF_ENTRIES = frozenset(
    {"copy", "fill", "zero", "_to_copy", "detach", "alias", "empty_like", "zeros_like", "ones_like"}
    | {"full_like", "_has_compatible_shallow_copy_type", "is_same_size"}
)
ROUNDS_BY_PLACE = frozenset({"pow", "atan2", "hypot"})  # on the CPU, at the end of a tensor


@dataclass(frozen=True)
class Operation:
    """An operation of a step.

    Attributes:
        name: without its namespace, and without what says that it writes in place.
        is_known: whether it is PyTorch's own; what others do to memory is not to be seen.
        is_view: whether what it returns lies in the memory of an argument.
        is_list: whether it is one of torch._foreach_*.
        is_entrywise: whether an entry of a result depends on that of the arguments alone.
        makes_constants: whether the values of its arguments play no part.
        written: position and name of the arguments that it writes to.
        is_out: whether those are only written to.
        functional: the same without the writing; None if there is none.
    """

    name: str
    is_known: bool
    is_view: bool
    is_list: bool
    is_entrywise: bool
    makes_constants: bool
    written: tuple[tuple[int, str], ...]
    is_out: bool
    functional: OpOverload | None


@cache
def operation(func: OpOverload) -> Operation:
    """What the schema says."""
    arguments, packet = func._schema.arguments, func._overloadpacket
    full_name = func._schema.name.split("::")[1]
    returned = [one.alias_info for one in func._schema.returns]
    written = tuple(
        (i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write
    )
    is_out, functional = any(a.is_out for a in arguments), None
    if written and not is_out:  # add_.Tensor → add.Tensor
        packet = getattr(aten, full_name.removesuffix("_"), packet)
    # Others round unlike their form in place: addmm, in bfloat16.
    if is_out or torch.Tag.pointwise in func.tags:
        kept = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        for other in (getattr(packet, name) for name in packet.overloads()):
            named = [(a.name, str(a.type)) for a in other._schema.arguments]
            if named == kept and not any(a.alias_info for a in other._schema.arguments):
                functional = other
    name = full_name.rstrip("_").removeprefix("_foreach_")
    return Operation(
        name=name,
        is_known=func.namespace in ("aten", "prims", "profiler"),
        is_view=func.namespace == "profiler"
        or torch.Tag.inplace_view in func.tags
        or any(alias is not None and not alias.is_write for alias in returned),
        is_list=full_name.startswith("_foreach_"),
        is_entrywise=name in _OF_ENTRIES
        or (name not in ROUNDS_BY_PLACE and _is_pointwise(getattr(aten, name, packet))),
        makes_constants=name.startswith("new_") or name.endswith("_like") or name == "zero",
        written=written,
        is_out=is_out,
        functional=functional,
    )


def _is_pointwise(packet: OpOverloadPacket) -> bool:
    return any(torch.Tag.pointwise in getattr(packet, one).tags for one in packet.overloads())


def one_by_one(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """``_foreach_add(xs, ys, alpha=a)`` → [x + a·y, …].

    PyTorch lacks the derivatives of some of these, and some that it has are wrong (2.13, 2.14.1:
    those with a tensor for a number, addcdiv).
    """
    return [by_name(name, *row, **options) for row, options in rows_of(args, kwargs)]


def rows_of(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The arguments of each."""
    args = [a.unbind() if i == 3 and isinstance(a, Tensor) else a for i, a in enumerate(args)]
    length = max(len(value) for value in args if isinstance(value, list | tuple))
    columns = [value if isinstance(value, list | tuple) else [value] * length for value in args]
    return ((list(row), dict(kwargs)) for row in zip(*columns, strict=True))


def by_name(name: str, x: Any, *others: Any, **kwargs: Any) -> Tensor:
    """The operation of that name, with tensors or numbers for all that may be a number."""
    if name == "zero":
        return torch.zeros_like(x)
    if name == "copy":
        source: Tensor = others[0]
        return source.to(x.device, x.dtype).expand_as(x)
    if name == "norm":
        order = others[0] if others else 2
        dtype = others[1] if len(others) > 1 else kwargs.get("dtype")
        norm: Tensor = torch.linalg.vector_norm(x, order, dtype=dtype)
        return norm
    if name in ("maximum", "minimum") and not isinstance(others[0], Tensor):
        name = {"maximum": "clamp_min", "minimum": "clamp_max"}[name]
    if name in ("addcmul", "addcdiv"):
        first, second, *value = others
        others, kwargs = (first, second), {"value": value[0]} if value else kwargs
    for key in kwargs.keys() & {"alpha", "value"}:  # x + α·y, x + value·y·z
        if isinstance(kwargs[key], Tensor):
            others = (others[0] * kwargs[key], *others[1:])
            kwargs = {name: value for name, value in kwargs.items() if name != key}
    result: Tensor = getattr(torch, name)(x, *others, **kwargs)
    return result


def leaves(values: Iterable[Any]) -> list[Any]:
    """Arguments, and what stands in lists."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += leaves(value)
        else:
            found.append(value)
    return found


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among them."""
    return [value for value in leaves(values) if isinstance(value, Tensor)]


def results_of(
    func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any], tracked: bool
) -> Any:
    """What an operation returns, or would write."""
    results = _computed(func, op, values, named, tracked)
    if not op.written:
        return results
    olds = tensors_in(named[name] if name in named else values[i] for i, name in op.written)
    return [
        _as_kept(new, old, op.is_out) for new, old in zip(tensors_in([results]), olds, strict=True)
    ]


def _as_kept(new: Tensor, old: Tensor, is_out: bool) -> Tensor:
    """As what it is written to can hold it."""
    if new.dtype != old.dtype or new.device != old.device:
        new = new.to(old.device, old.dtype)
    # What is only written to gets the shape of what it is given.
    return new if is_out or new.shape == old.shape else new.expand_as(old)


def _computed(
    func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any], tracked: bool
) -> Any:
    if op.is_list:
        results = one_by_one(op.name, values, named)
        if op.written and results[0].dtype in LOW:  # where x.mul_(0.3) rounds unlike x · 0.3
            exact = _in_place(func, op, [each(_constant_for, v) for v in values], named)[0]
            results = list(map(valued, results, exact))
        return results
    if op.name == "copy":
        return values[1]
    if not op.written:
        return func(*values, **named)
    if op.functional is not None:
        outputs = {name for _, name in op.written} if op.is_out else ()
        given = {name: value for name, value in named.items() if name not in outputs}
        results = op.functional(*values, **given)
        if not tracked or all(map(has_derivative, tensors_in([results]))):
            return results
    if op.is_out and tracked:
        raise Refused(f"its step calls {func}, which has no derivative")
    return _in_place(func, op, values, named)


def _in_place(
    func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any]
) -> list[Any]:
    """What it writes to tensors that nothing else has seen."""
    values, named = list(values), dict(named)
    for i, name in op.written:
        key: Any = name if name in named else i
        place: Any = named if name in named else values
        place[key] = each(torch.clone, place[key])
    func(*values, **named)
    return [named[name] if name in named else values[i] for i, name in op.written]


class Call(NamedTuple):
    """An operation on values, and what came of it."""

    func: OpOverload
    op: Operation
    values: list[Any]
    named: dict[str, Any]
    results: list[Tensor]

    def with_values(self, put: Callable[[Any], Any]) -> "Call":
        """Of what is put in place of each value."""
        values = [each(put, value) for value in self.values]
        named = {name: each(put, value) for name, value in self.named.items()}
        return self._replace(values=values, named=named)

    @property
    def arguments(self) -> list[Any]:
        """All of them."""
        return [*self.values, *self.named.values()]

    def again(self) -> list[Tensor]:
        """The results of the values that it has now."""
        tracked = torch.is_grad_enabled()
        return tensors_in([results_of(self.func, self.op, self.values, self.named, tracked)])


def calls_of(
    func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any], results: Any
) -> Iterator[Call]:
    """One operation, or, of one on lists, one for each row."""
    if not op.is_list:
        yield Call(func, op, values, named, tensors_in([results]))
        return
    for i, result in enumerate(results):
        row = [_row(value, i) for value in values]
        yield Call(func, op, row, {n: _row(value, i) for n, value in named.items()}, [result])


def _row(value: Any, i: int) -> Any:
    return [value[i]] if isinstance(value, list | tuple) else value


def results_with_numbers(
    func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any]
) -> Any:
    """The values that numbers give, with the derivative that tensors in their place have."""
    constants = [each(_constant_for, value) for value in values]
    exact = results_of(
        func, op, constants, {n: each(_constant_for, v) for n, v in named.items()}, False
    )
    values = [each(tensor_for, value) for value in values]
    named = {name: each(tensor_for, value) for name, value in named.items()}
    near = (
        one_by_one(op.name, values, named) if op.is_list else [by_name(op.name, *values, **named)]
    )
    pairs = zip(near, tensors_in([exact]), strict=True)
    results = [valued(new.to(value.dtype).expand_as(value), value) for new, value in pairs]
    return results[0] if isinstance(exact, Tensor) else results


def _constant_for(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return float(value.node.value.detach()) if isinstance(value, SymFloat) else value


def tensor_for(value: Any) -> Any:
    """The tensor that a number stands for; anything else stays."""
    return value.node.value if isinstance(value, SymFloat) else value


def has_derivative(tensor: Tensor) -> bool:
    """Whether autograd knows what it depends on, and can go back."""
    function = tensor.grad_fn
    return tensor.requires_grad and (function is None or function.name() != "NotImplemented")


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of an argument, or of all that stands in a list."""
    return list(map(function, value)) if isinstance(value, list | tuple) else function(value)
