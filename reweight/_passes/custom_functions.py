"""Calls of ``torch.autograd.Function`` and of TorchScript, which no mode of PyTorch's sees."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import (
    BackwardCFunction,
    Function,
    FunctionCtx,
    FunctionMeta,
    _SingleLevelFunction,
)
from torch.utils._pytree import tree_map

from reweight._passes.attention import plain_attention
from reweight._passes.memory import tensors_in
from reweight._passes.operations import dual, have_tangents, is_continuous, unpack
from reweight._passes.random_state import RandomState

Handler: TypeAlias = Callable[[Any, Callable[..., Any], Any], Any]
"""Gets the function, what applies it, and its arguments; returns the outputs."""


@contextmanager
def applied_by(handler: Handler) -> Iterator[None]:
    """Within, dual numbers go to ``handler(function, apply, args)`` in place of ``apply(*args)``.

    Functions that were bound before are seen as well. Other threads' calls are left alone.
    """
    in_python = isinstance(vars(Function).get("apply"), classmethod)
    with _by_python(handler) if in_python else _by_lookups(handler):
        yield


@contextmanager
def scripts_called_by(look: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Within, ``look`` gets the tensors that go to TorchScript, before it runs.

    In ``torch.no_grad`` it has tangents where it has gradients: TorchScript that has run with
    gradients has them there as well. Other threads' calls are left alone.
    """
    thread = threading.get_ident()
    kinds: list[Any] = [torch._C.ScriptFunction, torch._C.ScriptMethod]
    calls = [kind.__call__ for kind in kinds]

    def looked_at(call: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return call(self, *args, **kwargs)
            look(tensors_in(args, kwargs))
            if torch.is_grad_enabled():
                return call(self, *args, **kwargs)
            with torch._C.DisableTorchFunction():  # or a mode hides the tangents
                before = RandomState((t.device for t in tensors_in(args, kwargs)), ())
                given, named = tree_map(_with_graph, (args, kwargs))
                with forward_ad._set_fwd_grad_enabled(False):
                    values = call(self, *given, **named)
                if not any(value.requires_grad for value in tensors_in([values])):
                    return values
                before.restore()
                return call(self, *args, **kwargs)

        return run

    for kind, call in zip(kinds, calls, strict=True):
        kind.__call__ = looked_at(plain_attention()(call))
    try:
        yield
    finally:
        for kind, call in zip(kinds, calls, strict=True):
            kind.__call__ = call


def _with_graph(value: Any) -> Any:
    """With a graph in place of a tangent."""
    return unpack(value)[0].detach().requires_grad_() if have_tangents([value]) else value


@contextmanager
def _by_python(handler: Handler) -> Iterator[None]:
    """Until PyTorch 2.13 ``Function.apply`` asks its base class for ``apply`` at every call."""
    thread = threading.get_ident()

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        original = super(_SingleLevelFunction, function).apply
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        if not torch.is_grad_enabled():  # no tangent where there is no gradient
            args = tuple(each.detach() if is_continuous(each) else each for each in args)
        if not have_tangents(args):
            return original(*args, **kwargs)
        return handler(function, original, args)

    base: Any = _SingleLevelFunction  # which inherits ``apply`` itself
    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


@contextmanager
def _by_lookups(handler: Handler) -> Iterator[None]:
    """Since PyTorch 2.14 ``apply`` is compiled, and only what it looks up can be another."""
    calls, jvp = _Calls(handler), BackwardCFunction.apply_jvp
    meta: Any = FunctionMeta  # which inherits ``__getattribute__`` itself
    backward: Any = BackwardCFunction
    meta.__getattribute__ = lambda function, name: calls.look_up(function, name)
    backward.apply_jvp = lambda ctx, *directions: calls.tangents(ctx, directions, jvp)
    try:
        yield
    finally:
        del meta.__getattribute__
        backward.apply_jvp = jvp


class _Calls:
    """Forward and ``jvp`` of the functions as they are applied.

    The handler gets copies of the arguments, for the tangents; then the function runs as ever, for
    the values and their graph.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler, self._thread = handler, threading.get_ident()
        self._let_through: Any = None  # the function that the handler applies next
        self._begun: tuple[Any, bool, bool] | None = None
        # Of the calls with dual numbers: each output's tangent, and the place of the argument that
        # it is, if it was changed in place. None where the function's own rule is asked for.
        self._found: list[list[tuple[Tensor | None, int | None]] | None] = []

    def look_up(self, function: Any, name: str) -> Any:
        """What the class has of that name, but for the forward that ``apply`` asks for.

        It asks for ``_backward_cls`` first, with the modes of the call, then for the forward.
        """
        value = type.__getattribute__(function, name)
        if threading.get_ident() != self._thread:
            return value
        if name == "_backward_cls" and torch._C._is_fwd_grad_enabled():
            by_its_rule = self._let_through is function or _is_ours(function)
            self._begun = function, by_its_rule, torch.is_grad_enabled()
            self._let_through = None
        elif name == "forward" and self._begun is not None and self._begun[0] is function:
            begun, self._begun = self._begun, None
            return partial(self._forward, value, *begun)
        return value

    def tangents(self, ctx: Any, directions: Any, jvp: Callable[..., Any]) -> Any:
        """Of the outputs, in place of ``jvp``, which runs where the handler has asked for it."""
        found = self._found.pop() if threading.get_ident() == self._thread else None
        if found is None:
            return jvp(ctx, *directions)
        each = []
        for tangent, place in found:
            direction = None if place is None else directions[place]
            if direction is not None:  # PyTorch wants the same tensor
                tangent = direction if tangent is None else direction.copy_(tangent)
            each.append(tangent)
        return each[0] if len(each) == 1 else tuple(each)

    def _forward(
        self,
        forward: Callable[..., Any],
        function: Any,
        by_its_rule: bool,
        has_gradients: bool,
        *args: Any,
    ) -> Any:
        takes_context = function.setup_context is _SingleLevelFunction.setup_context
        inputs, tangents = args[1:] if takes_context else args, None
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            moving = [have_tangents([each]) for each in inputs]
            if any(moving) and has_gradients and not by_its_rule:
                tangents = self._handled(function, inputs)
        result = forward(*args)
        if not any(moving) or by_its_rule:
            self._found += [None] if any(moving) else []
            return result
        ctx = args[0] if takes_context else FunctionCtx()
        if not takes_context:
            function.setup_context(ctx, inputs, result)
        constant, changed = (
            {id(each) for each in getattr(ctx, name, None) or ()}
            for name in ("non_differentiable", "dirty_tensors")
        )
        outputs = list(result) if isinstance(result, tuple) else [result]
        found: list[tuple[Tensor | None, int | None]] = []
        for i, y in enumerate(outputs):
            if not is_continuous(y) or id(y) in constant:
                found.append((None, None))
                continue
            places = [j for j, each in enumerate(inputs) if each is y and id(y) in changed]
            tangent = None if tangents is None else tangents[i]
            if tangent is None and not any(moving[j] for j in places):
                tangent = torch.zeros_like(y)
            if not places and any(_is_alias(y, each) for each in inputs):
                outputs[i] = y.clone()  # or PyTorch would ask for tangents that are such, too
            found.append((tangent, places[0] if places else None))
        self._found.append(found)
        return tuple(outputs) if isinstance(result, tuple) else outputs[0]

    def _handled(self, function: Any, inputs: Any) -> list[Tensor | None]:
        def apply(*args: Any) -> Any:
            self._let_through = function
            return function.apply(*args)

        tensors = {id(each): each for each in inputs if isinstance(each, Tensor)}
        copies = {key: _copy(tensor) for key, tensor in tensors.items()}
        random_state = RandomState({tensor.device for tensor in tensors.values()}, [])
        try:
            result = self._handler(
                function, apply, tuple(copies.get(id(each), each) for each in inputs)
            )
        finally:
            random_state.restore()
        outputs = result if isinstance(result, tuple) else (result,)
        return [unpack(each)[1] if is_continuous(each) else None for each in outputs]


def _copy(tensor: Tensor) -> Tensor:
    value, tangent = unpack(tensor) if is_continuous(tensor) else (tensor, None)
    return value.clone() if tangent is None else dual(value.clone(), tangent.clone())


def _is_ours(function: Any) -> bool:
    """Whether it is one of this package that has a rule."""
    return function.__module__.startswith("reweight.") and function.jvp is not Function.jvp


def _is_alias(tensor: Tensor, other: Any) -> bool:
    shares_memory: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]
    return isinstance(other, Tensor) and shares_memory(tensor, other)
