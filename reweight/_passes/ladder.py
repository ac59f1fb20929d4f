"""How each operation of a model gets its tangents: a ladder, so that one does not decide for all.

1. by PyTorch's forward rule, or by one of ours;
2. by its own backward, which is as exact;
3. by a central difference of it alone, in float64, or in its own precision if it knows no other.

What is left fails, and the whole model is differentiated by differences.
"""

import enum
import logging
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NoReturn, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from reweight._passes.attention import plain_attention
from reweight._passes.operations import (
    NoDerivativeError,
    by_backward,
    by_differences,
    have_tangents,
    is_continuous,
)

_logger = logging.getLogger("reweight")
T = TypeVar("T")

_MOST_RESTARTS = 100


class Rung(enum.Enum):
    """A way to the tangents of an operation that has no forward rule, the next one after it."""

    BACKWARD = "by its backward"
    DOUBLE_DIFFERENCES = "by differences of that operation, in float64"
    DIFFERENCES = "by differences of that operation, in its own precision"


_WAYS: dict[Rung, Callable[..., Any]] = {
    Rung.BACKWARD: by_backward,
    Rung.DOUBLE_DIFFERENCES: partial(by_differences, double=True),
    Rung.DIFFERENCES: partial(by_differences, double=False),
}


class NoTangentError(NotImplementedError):
    """An operation has no forward mode, and none of the ladder's other ways works for it."""


class NotCompiledError(Exception):
    """A pass that was to run compiled cannot."""


class _Restart(BaseException):
    """The pass has to begin anew, for what it did last is half done; not for the model to catch."""


def _named(*names: str) -> list[Any]:
    """Functions and methods of these names, as they are and in place, where PyTorch has them."""
    places = torch, Tensor, torch.linalg, F
    each = [n for name in names for n in (name, f"{name}_")]
    return [getattr(place, name) for place in places for name in each if hasattr(place, name)]


_NOT_BY_FORWARD_MODE = _named(
    "scatter_reduce",  # drops tangents of products
    "linear_cross_entropy",  # drops them
    "cholesky_inverse",  # wrong
    "triangular_solve",  # wrong where the other triangle moves
    # Another derivative than the backward's: of matrices that move without staying symmetric, and
    # of places that are written twice.
    "cholesky",
    "cholesky_ex",
    "eigh",
    "as_strided_scatter",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
)
"""Where PyTorch's forward rule is not the derivative that its backward gives, up to 2.14."""


GRADIENTS = (
    torch.autograd.grad,
    torch.autograd.backward,
    Tensor.backward,
    Tensor.register_hook,
    Tensor.retain_grad,
)
"""Take gradients, or wait for one, and so need a graph."""


class Ladder:
    """What was found out about the operations of a model; it is kept from step to step.

    Attributes:
        ways: how the operations without forward rule got their tangents in the last pass, by name.
        told: the same of all passes.
        needs_graph: whether parameters need a graph: the model takes gradients in its forward.
        recalls: whether passes do what the first forward did, whose values are recalled.
        too_small: entries of the largest batch for which there was nothing worth recalling.
        has_seen_uncompiled: whether it was asked if the model may run compiled.
    """

    def __init__(self) -> None:
        self.ways: dict[str, Rung] = {}
        self.needs_graph = self.has_seen_uncompiled = False
        self.recalls, self.too_small = True, 0
        self.has_looked_for_cuts = False  # from the graph: finite differences do, once
        self._rules: set[str] = set()  # forward rules of custom Functions
        self._rungs: dict[Any, Rung] = dict.fromkeys(_NOT_BY_FORWARD_MODE, Rung.BACKWARD)
        self.told: dict[str, Rung] = {}
        self._cut: str | None = None  # what later gradients have no tangents through

    def run(self, forward: Callable[[], T]) -> T:
        """A pass, from its beginning again whenever an operation has to go down."""
        for _ in range(_MOST_RESTARTS):
            self.ways, self._cut = {}, None
            try:
                result = forward()
            except _Restart:
                continue
            for name, rung in self.ways.items():
                if self.told.get(name) is not rung:
                    _logger.info("No forward mode of %s: exact %s.", name, rung.value)
            self.told |= self.ways
            return result
        raise NoTangentError("New operations without forward mode come with every pass.")

    def require_compilable(self, forward: Callable[[], Any]) -> None:
        """Look once at an uncompiled pass: the compiler drops tangents and rules without a word."""
        self.has_seen_uncompiled = True
        self.run(forward)
        if self.ways or self._rules:
            names = ", ".join(sorted(self.ways.keys() | self._rules))
            raise NotCompiledError(f"Compiled code would not have the tangents of {names}.")

    def handlers(self) -> dict[Any, Callable[..., Any]]:
        """Operation → its call, of those that have gone down."""
        return {
            func: partial(self._call, func, func)
            for func in self._rungs
            if not isinstance(func, str)
        }

    def descend(self, key: Any, args: Any, kwargs: Any, error: Exception) -> NoReturn:
        """One more operation whose tangents come another way, for forward mode has failed.

        What has no tangent, or has gone down already, has failed by itself.
        """
        known = key in self._rungs or key in GRADIENTS
        if known or not have_tangents(tree_leaves((args, kwargs))):
            raise error
        self._rungs[key] = Rung.BACKWARD
        raise _Restart from error

    def require_tangents(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """For operations that others have registered: they may lose tangents without a word."""
        if all(have_tangents([leaf]) for leaf in tree_leaves(result) if is_continuous(leaf)):
            return
        if have_tangents(tree_leaves((args, kwargs))):
            self._rungs[func] = Rung.BACKWARD
            raise _Restart

    def apply(self, function: Any, apply: Callable[..., Any], args: Any) -> Any:
        """Apply a custom Function to dual numbers."""
        key = f"{function.__module__}.{function.__qualname__}"  # it may be made anew at every call
        if function.jvp is torch.autograd.Function.jvp:
            self._rungs.setdefault(key, Rung.BACKWARD)
        if key in self._rungs:
            return self._call(key, apply, *args)
        if not key.startswith("reweight."):
            self._rules.add(key)
        try:
            return apply(*args)
        except Exception as error:
            self.descend(key, args, {}, error)

    def gradient(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take a gradient, or look out for one, in the model's forward."""
        wanted = filter(is_continuous, tree_leaves(kwargs.get("inputs", args[1:2])))
        if not self.needs_graph and have_tangents(t for t in wanted if not t.requires_grad):
            self._restart_with_graph()
        constant = not kwargs.get("create_graph")
        if self._cut is not None and not constant:
            raise NoTangentError(f"The model takes a gradient through {self._cut}.")
        try:
            with forward_ad._set_fwd_grad_enabled(not constant):
                return func(*args, **kwargs)
        except RuntimeError:
            if self.needs_graph:
                raise
            self._restart_with_graph()

    def give_up_recall(self) -> NoReturn:
        """For good: a pass has done something else than the first forward."""
        self.recalls = False
        raise _Restart

    def _restart_with_graph(self) -> NoReturn:
        self.needs_graph = True
        raise _Restart

    @plain_attention()
    def _call(self, key: Any, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, rung = tree_leaves((args, kwargs)), self._rungs[key]
        if not have_tangents(leaves):
            return func(*args, **kwargs)
        name = _name(key)
        if any(isinstance(leaf, FunctionType | nn.Module) for leaf in leaves):
            raise NoTangentError(f"{name} takes functions, which may hold tensors of their own.")
        self.ways[name] = rung
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            self._cut = name
        try:
            return _WAYS[rung](func, args, kwargs)
        except NoDerivativeError as error:
            rungs = list(Rung)
            if rung is rungs[-1]:
                raise NoTangentError(f"There is no derivative of {name}: {error}") from error
            self._rungs[key] = rungs[rungs.index(rung) + 1]
            raise _Restart from error


def _name(key: Any) -> str:
    known = key if isinstance(key, str) else resolve_name(key)
    return known or getattr(key, "__name__", str(key))
