"""Numbers that a step takes out of tensors, by ``.item()``, keep their derivative."""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MEMORY = {"data_ptr", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage"}
_NUMBER = {"item", "tolist", "__float__"}
_SIZE = {"size", "numel", "nelement", "__len__", "stride"}
_OF_NUMBERS = {"full", "full_like", "new_full"}  # which take a tensor for their number


class Refused(TypeError):
    """Why the step of an optimizer cannot be differentiated."""


class Source(Protocol):
    """Where numbers come from."""

    def computed(self, function: Callable[..., Any], *values: Tensor) -> Any:
        """The function of tensors, recorded."""

    def decided(self, value: Tensor) -> bool:
        """What a condition comes to."""

    def make_constant(self) -> None:
        """Is called where a number loses its derivative."""


class Number:
    """What a ``torch.SymFloat`` stands for: a scalar tensor with its graph.

    The names are those that SymFloat calls. ``float(…)``, as of ``math.sqrt``, makes a constant of
    it, which the source is told.
    """

    constant = None

    def __init__(self, value: Tensor, source: Source) -> None:
        self.value, self._source = value, source

    def _like(self, value: Tensor) -> "Number":
        return Number(value, self._source)

    def is_float(self) -> bool:
        return self.value.is_floating_point()

    def is_bool(self) -> bool:
        return not self.is_float()

    def is_symbolic(self) -> bool:
        return True

    def is_int(self) -> bool:
        return False

    is_constant = is_nested_int = is_int

    def wrap_float(self, number: float) -> "Number":
        value = self._source.computed(partial(torch.tensor, float(number), dtype=torch.float64))
        return self._like(value)

    wrap_int = wrap_float

    def sym_float(self) -> "Number":
        return self

    def guard_float(self, *where: Any) -> float:
        if self.value.requires_grad:
            self._source.make_constant()
        return float(self.value.detach())

    def guard_bool(self, *where: Any) -> bool:
        return self._source.decided(self.value)

    expect_true = bool_ = guard_bool

    def _graph_repr(self) -> str:
        return str(self.value.detach())

    _str = str = _graph_repr


def _method(function: Callable[..., Any]) -> Callable[..., Number]:
    def method(self: Number, *others: Number) -> Number:
        values = (other.value for other in others)
        return self._like(self._source.computed(function, self.value, *values))

    return method


def valued(near: Tensor, exact: Tensor) -> Tensor:
    """The second value, with the derivative of the first."""
    result: Tensor = _Valued.apply(near, exact)  # type: ignore[no-untyped-call]
    return result


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, near: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


def _by_python(function: Callable[..., Any], python: Callable[..., float]) -> Callable[..., Any]:
    """To the last bit what Python computes; PyTorch's own may be another, by the processor."""

    def both(*values: Tensor) -> Tensor:
        if any(value.dim() for value in values):  # of a batch
            return function(*values)  # type: ignore[no-any-return]
        exact = python(*(value.item() for value in values))
        near = function(*values)
        return valued(near, torch.full_like(near, exact))

    return both


_FUNCTIONS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("add",): operator.add,
    ("sub",): operator.sub,
    ("mul",): operator.mul,
    ("truediv", "float_truediv"): operator.truediv,
    ("pow", "float_pow", "pow_by_natural"): _by_python(operator.pow, operator.pow),
    ("neg",): operator.neg,
    ("abs",): operator.abs,
    ("gt",): operator.gt,
    ("ge",): operator.ge,
    ("lt",): operator.lt,
    ("le",): operator.le,
    ("eq",): operator.eq,
    ("ne",): operator.ne,
    ("sym_min",): torch.minimum,
    ("sym_max",): torch.maximum,
    ("sym_sqrt",): _by_python(torch.sqrt, math.sqrt),
    ("sym_exp",): _by_python(torch.exp, math.exp),
    ("sym_log",): _by_python(torch.log, math.log),
}
for _names, _function in _FUNCTIONS.items():
    for _name in _names:
        setattr(Number, _name, _method(_function))


class NumbersKept(TorchFunctionMode):
    """Numbers come out of tensors by :class:`Number`, and memory not at all.

    Args:
        number_of: what ``.item()`` gives.
        constant_of: a tensor for what makes constants, ``float`` and ``.tolist()``.
        on_size: is called where the step asks for the size of a tensor.
    """

    def __init__(
        self,
        number_of: Callable[[Tensor], Any],
        constant_of: Callable[[Tensor], Tensor],
        on_size: Callable[[], None],
    ) -> None:
        super().__init__()
        self._number_of, self._constant_of, self._on_size = number_of, constant_of, on_size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _MEMORY:
            raise Refused(f"its step reads memory itself, by Tensor.{name}")
        if name in _SIZE or (name == "__get__" and func.__self__ is Tensor.shape):
            self._on_size()
        if name == "item":
            return self._number_of(args[0])
        if name in _NUMBER:
            return getattr(self._constant_of(args[0]), name)()
        kwargs = kwargs or {}
        if name not in _OF_NUMBERS:  # a tensor for a number is its item()
            for key in kwargs.keys() & {"alpha", "value"}:
                if isinstance(kwargs[key], Tensor):
                    kwargs = {**kwargs, key: self._number_of(kwargs[key])}
        return func(*args, **kwargs)
