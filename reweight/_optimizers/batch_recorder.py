"""A step recorded of several parameters at once: each stands for a batch of others like it."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymFloat, Tensor
from torch._ops import OpOverload

from reweight._optimizers.operations import (
    Operation,
    by_name,
    each,
    has_derivative,
    leaves,
    results_of,
    rows_of,
    tensor_for,
    tensors_in,
)
from reweight._optimizers.recorder import Recorder
from reweight._optimizers.scalars import Number, Refused


class BatchRecorder(Recorder):
    """What the step does to one parameter it does to all of its batch, in one operation.

    The step sees one tensor; what is held for it has a dimension more, the first. Batches must not
    meet, for then a parameter would count as often as there are others like it.

    Attributes:
        follows: by batch, which of its members the step is right for: where a condition is not the
            same for all, it is decided as for most.
    """

    def __init__(self, wide: torch.dtype | None) -> None:
        super().__init__(wide)
        self.follows: list[list[bool]] = []

    def hold(self, handle: Tensor, members: Sequence[Tensor], batch: int) -> Tensor:
        """Let a tensor stand for others, which are returned as one."""
        if batch == len(self.follows):
            self.follows.append([True] * len(members))
        whole = torch.stack(list(members))
        self.write(handle, _of(batch, whole))
        return whole

    def applied(self, function: Callable[..., Any], *values: Tensor) -> Any:
        """A function of each member."""
        batch = _batch_of(values)
        if batch is None:
            return function(*values)
        dims = tuple(0 if _is_batch(value) else None for value in values)
        return _of(batch, torch.vmap(function, dims)(*values))

    def computed(self, function: Callable[..., Any], *values: Tensor) -> Any:
        """Of numbers, one for each member, or one for all."""
        return _of(_batch_of(values), super().computed(function, *values))

    def results(
        self, func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any]
    ) -> tuple[Any, bool]:
        """Of operations on lists each row by itself, for they may be of different batches."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused("its step draws numbers")  # for each member others
        given = [tensor_for(value) for value in leaves([*values, *named.values()])]
        tensors = [value for value in given if isinstance(value, Tensor)]
        tracked = any(tensor.requires_grad for tensor in tensors)
        if not any(map(_is_batch, tensors)):
            return super().results(func, op, values, named)
        if op.is_list:
            found = [self._one(None, op, *row) for row in rows_of(values, named)]
        else:
            found = self._one(func, op, values, named)
        if any(new.requires_grad and not has_derivative(new) for new in tensors_in([found])):
            raise Refused(f"its step calls {func}, which has no derivative")
        return found, tracked

    def _one(
        self,
        func: OpOverload | None,
        op: Operation,
        values: list[Any],
        named: dict[str, Any],
    ) -> Any:
        """An operation whose tensors are of one batch; without a function it goes by its name."""
        arguments = leaves([*values, *named.values()])
        has_numbers = any(type(value) is SymFloat for value in arguments)
        tensors = [value for value in map(tensor_for, arguments) if isinstance(value, Tensor)]
        batch = _batch_of(tensors)

        def function(*members: Tensor) -> Any:
            left = iter(members)

            def put(value: Any) -> Any:
                return next(left) if isinstance(tensor_for(value), Tensor) else value

            args = [each(put, value) for value in values]
            options = {name: each(put, value) for name, value in named.items()}
            if func is not None and not has_numbers:
                return results_of(func, op, args, options, False)
            first = tensors_in(args)[0]
            result = by_name(op.name, *args, **options).to(first.dtype)
            result = result.expand_as(first) if op.written else result
            return [result] if op.written and func is not None else result

        written = tensors_in(named[n] if n in named else values[i] for i, n in op.written)
        goes_as_one = op.is_entrywise and not op.makes_constants and all(map(_is_batch, written))
        # Where types differ, those of no dimension count otherwise: not if they have one more.
        num_types = len({value.dtype for value in tensors if _is_batch(value)})
        if goes_as_one and (has_numbers or num_types == 1):
            num_dims = max(value.dim() - _is_batch(value) for value in tensors)
            return _of(batch, function(*(_broad(value, num_dims) for value in tensors)))
        return self.applied(function, *tensors)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Write."""
        if not _is_batch(new):
            super().replace(old, new)
        elif old.shape != new.shape[1:]:
            raise Refused("its step gives memory another shape")
        else:
            self.write(old, new)

    def bound(self, results: Any) -> Any:
        """Memory for one member."""
        if not isinstance(results, Tensor) or not _is_batch(results):
            return super().bound(results)
        handle = torch.empty_like(results.detach()[0], memory_format=torch.contiguous_format)
        self.write(handle, results)
        return handle

    def number_of(self, tensor: Tensor) -> Any:
        """One for each member."""
        with self.recording():
            value = self.read(tensor)
            if not _is_batch(value):
                return super().number_of(tensor)
            return SymFloat(Number(_of(value.batch, value.double()), self))  # type: ignore[attr-defined]

    def constant_of(self, tensor: Tensor) -> Tensor:
        """None is that of all members."""
        if _is_batch(self.read(tensor)):
            raise Refused("its step takes constants out of tensors")
        return super().constant_of(tensor)

    def decided(self, value: Tensor) -> bool:
        """As for most of those that what was decided before is right for."""
        batch = _batch_of([value])
        if batch is None:
            return super().decided(value)
        holds, follows = self.computed(Tensor.tolist, value), self.follows[batch]
        answer: bool = 2 * sum(itertools.compress(holds, follows)) >= sum(follows)
        pairs = zip(follows, holds, strict=True)
        self.follows[batch] = [does and holds == answer for does, holds in pairs]
        return answer

    def make_constant(self) -> None:
        """None is that of all members."""
        raise Refused("its step takes constants out of tensors")


def _is_batch(tensor: Tensor) -> bool:
    return getattr(tensor, "batch", None) is not None


def _broad(tensor: Tensor, num_dims: int) -> Tensor:
    """With so many dimensions for each member, as entries of its result are by broadcasting."""
    missing = num_dims + 1 - tensor.dim()
    if not missing or not _is_batch(tensor):
        return tensor
    return tensor.view(tensor.shape[0], *[1] * missing, *tensor.shape[1:])


def _of(batch: int | None, results: Any) -> Any:
    """Say which batch tensors are of."""
    for tensor in tensors_in([results]):
        tensor.batch = batch  # type: ignore[attr-defined]
    return results


def _batch_of(tensors: Sequence[Tensor]) -> int | None:
    """The one that all are of which are of any."""
    found = {batch for t in tensors if (batch := getattr(t, "batch", None)) is not None}
    if len(found) > 1:
        raise Refused("parameters meet in its step")
    return found.pop() if found else None
