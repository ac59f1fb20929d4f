"""Any step, recorded copy-on-write below autograd.

Under a ``TorchDispatchMode`` every operation of a step arrives below autograd: ``no_grad``,
``.data``, ``.detach()``, foreach, ``out=`` and views all look alike there, as operations on
storages. What a storage holds is kept beside it, as a value that autograd records; a write makes a
new value. So no memory is written: what the optimizer holds needs no copy and does not change, and
no tensor that a backward needs is modified in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import SymFloat, Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from reweight._optimizers.held import (
    Held,
    geometry_of,
    is_plain,
    scatter,
    storage_of,
    viewed,
)
from reweight._optimizers.operations import (
    LOW,
    SIGNS,
    Call,
    Operation,
    aten,
    calls_of,
    each,
    has_derivative,
    leaves,
    operation,
    results_of,
    results_with_numbers,
    tensors_in,
)
from reweight._optimizers.scalars import Number, NumbersKept, Refused
from reweight._ranks.collectives import is_sharded


class Recorder(TorchDispatchMode):
    """Runs the operations of a step on values beside the storages.

    Args:
        wide: the type that the step computes in where it asks for a lower one; None for as it asks.
        keeps_numbers: whether ``.item()`` gives a number that keeps its derivative, of a type of
            its own that not all code takes for a number.

    Attributes:
        has_constants: whether numbers that depend on the gradient became constants.
        signs: operations that it went through whose derivative is 0.
        lost: operations that have no derivative, of what depends on the gradient.
        is_widened: whether the step asked for a lower type than ``wide``.
        is_entrywise: whether what becomes of an entry depends on no other.
        calls: what it was computed by, in order, while it is entrywise; None to keep none.
    """

    def __init__(self, wide: torch.dtype | None = None, keeps_numbers: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_constants = self.is_widened = False
        self.is_entrywise = True
        self.calls: list[Call] | None = None
        self.signs: set[str] = set()
        self.lost: set[str] = set()
        self._wide, self._keeps_numbers = wide, keeps_numbers
        self._held: dict[int, Held] = {}
        # The dispatcher as it is outside of all modes; below autograd it is without it.
        self._outside = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )

    def numbers(self) -> NumbersKept:
        """To go around the step too: what no dispatch mode sees."""
        return NumbersKept(self.number_of, self.constant_of, self._on_size)

    def read(self, tensor: Tensor) -> Tensor:
        """What this view of a storage holds now."""
        if not (is_plain(tensor) or is_sharded(tensor)):
            raise Refused(f"its step computes with tensors of the class {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            raise Refused(f"its step computes with a tensor of layout {tensor.layout}")
        held = self._held.get(storage_of(tensor)._cdata)
        if held is None:
            return tensor.data  # with a version counter of its own, for the step counts its writes
        geometry = geometry_of(tensor)
        if held.geometry == geometry:
            return held.value
        if not is_plain(tensor):
            raise Refused("its step takes views of sharded parameters")
        seen: Tensor = self.applied(lambda value: viewed(held, value, tensor), held.value)
        return seen

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Let this view of a storage hold that from now on."""
        storage, geometry = storage_of(tensor), geometry_of(tensor)
        covers = storage.nbytes() == tensor.numel() * tensor.element_size()
        if is_plain(tensor) and not (covers and tensor.is_contiguous()):
            everything = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            before, place = self.read(everything), geometry
            value = self.applied(lambda all, new: scatter(all.clone(), new, place), before, value)
            geometry = geometry_of(everything)
        self._held[storage._cdata] = Held(storage, value, geometry)

    def recording(self) -> "_Recording":
        """With autograd, as outside of the step."""
        return _Recording(self._outside)

    def applied(self, function: Callable[..., Any], *values: Tensor) -> Any:
        """A function of values that are held."""
        return function(*values)

    def computed(self, function: Callable[..., Any], *values: Tensor) -> Any:
        """The same of numbers, which the step does not ask for."""
        with self.recording(), torch._C.DisableTorchFunction():
            return function(*values)

    def decided(self, value: Tensor) -> bool:
        """What a condition comes to."""
        return bool(self.computed(bool, value))

    def make_constant(self) -> None:
        """A number has lost its derivative."""
        self.has_constants = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which is at every operation; the step runs uncompiled as a whole

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        op, kwargs = operation(func), kwargs or {}
        if not op.is_known:
            raise Refused(f"its step calls {func}, which is not an operation of PyTorch's own")
        if self._wide is not None and kwargs.get("dtype") in LOW:
            kwargs, self.is_widened = {**kwargs, "dtype": self._wide}, True
        if self.is_entrywise and not op.is_entrywise:
            self.is_entrywise = not any(t.dim() for t in tensors_in([*args, *kwargs.values()]))
        if op.is_view:
            return func(*args, **kwargs)
        with self.recording():
            return self._run(func, op, args, kwargs)

    def _run(
        self, func: OpOverload, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        olds = [kwargs[name] if name in kwargs else args[i] for i, name in op.written]
        values = [each(self._value, value) for value in args]
        named = {name: each(self._value, value) for name, value in kwargs.items()}
        results, tracked = self.results(func, op, values, named)
        if self.calls is not None and self.is_entrywise:
            self.calls += calls_of(func, op, values, named, results)
        if tracked:
            self._note(func, op, results)
        if not op.written:
            return self.bound(results)
        for old, new in zip(tensors_in(olds), results, strict=True):
            self.replace(old, new)
        return (olds[0] if len(olds) == 1 else tuple(olds)) if func._schema.returns else None

    def results(
        self, func: OpOverload, op: Operation, values: list[Any], named: dict[str, Any]
    ) -> tuple[Any, bool]:
        """What it returns or would write, and whether it depends on a gradient."""
        given = leaves([*values[op.name == "copy" :], *named.values()])  # not what is written over
        if any(type(value) is SymFloat for value in given):
            self.is_entrywise = False
            return results_with_numbers(func, op, values, named), True
        tracked = any(isinstance(value, Tensor) and value.requires_grad for value in given)
        return results_of(func, op, values, named, tracked), tracked

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Write, of an operation that may give what it only writes to another shape."""
        if old.shape != new.shape:
            old.set_(torch.empty_like(new).untyped_storage(), 0, new.shape, new.stride())
        self.write(old, new)

    def _note(self, func: OpOverload, op: Operation, results: Any) -> None:
        if op.name in SIGNS:
            self.signs.add(op.name)
        elif func is aten._local_scalar_dense.default:
            self.has_constants |= isinstance(results, float)
        elif not op.makes_constants:
            floats = (one for one in tensors_in([results]) if one.is_floating_point())
            if not all(map(has_derivative, floats)):
                self.lost.add(op.name)

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0:  # how x · number arrives here
            number = getattr(value, "_wrapped_number", None)
            if isinstance(number, SymFloat):
                return number
        return self.read(value)

    def bound(self, results: Any) -> Any:
        """The same memory as tensors that the step may hold."""
        if isinstance(results, list | tuple):
            return type(results)(map(self.bound, results))
        if not isinstance(results, Tensor) or not results.requires_grad:
            return results
        handle = results.data  # with a version counter of its own, as above
        storage = storage_of(handle)
        self._held[storage._cdata] = Held(storage, results, geometry_of(handle))
        return handle

    def number_of(self, tensor: Tensor) -> Any:
        """What its ``.item()`` gives."""
        with self.recording():
            value = self._asked_for(tensor)
            if not value.requires_grad:
                return value.item()
            if self._keeps_numbers:
                return SymFloat(Number(value.double(), self))
            self.make_constant()
            return value.detach().item()

    def constant_of(self, tensor: Tensor) -> Tensor:
        """For what makes constants."""
        with self.recording():
            value = self._asked_for(tensor)
            if value.requires_grad:
                self.make_constant()
            return value.detach()

    def _asked_for(self, tensor: Tensor) -> Tensor:
        value = self.read(tensor)
        if self.calls is not None:
            func = aten._local_scalar_dense.default
            self.calls.append(Call(func, operation(func), [value], {}, []))
        return value

    def _on_size(self) -> None:
        self.is_entrywise = False


class _Recording:
    """As a context; entering it is most of what recording costs."""

    def __init__(self, outside: tuple[Any, Any]) -> None:
        # Leaving the inference mode lets gradients be recorded too.
        leaves_inference = torch.is_inference_mode_enabled()
        self._mode = torch.inference_mode(False) if leaves_inference else torch.enable_grad()
        self._guard = torch._C._ForceDispatchKeyGuard(*outside)

    def __enter__(self) -> None:
        self._mode.__enter__()
        self._guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._guard.__exit__(*error)
        self._mode.__exit__(*error)
