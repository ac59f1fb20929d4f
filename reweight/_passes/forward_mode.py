"""The forward-mode pass with less arithmetic than PyTorch's own, and the same result.

Its values are those of the first forward, as far as they are still there or anything reads them;
what is left of it are the products of the tangents.
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reweight._passes.attention import attention_layer, in_plain_operations, no_fast_path
from reweight._passes.custom_functions import applied_by, scripts_called_by
from reweight._passes.deferred import Deferred
from reweight._passes.fast_rules import FAST_RULES, OF_KNOWN, OF_TANGENTS, PUT_OFF, VIEWS
from reweight._passes.ladder import GRADIENTS, Ladder
from reweight._passes.memory import is_large, is_plain, memory_of, tensors_in
from reweight._passes.norm_rules import completed
from reweight._passes.operations import have_tangents, unpack
from reweight._passes.primal_cache import ASKS, Call, Departure, PrimalCache
from reweight._passes.tangent_rules import RULES


class TangentsWithGradients(TorchFunctionMode):
    """Cuts tangents where ``torch.no_grad`` cuts gradients."""

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, without tangents if it is without gradients."""
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


class _ForwardMode(TangentsWithGradients):
    """Forward mode by the rules of this room where they apply, and by the ladder's other ways."""

    def __init__(self, cache: PrimalCache, ladder: Ladder) -> None:
        super().__init__()
        self._recall, self._ladder = cache.again(), ladder
        if cache.is_of_no_use:
            ladder.too_small = max(ladder.too_small, cache.num_entries)
        self.deferred = Deferred(ladder.give_up_recall)
        self._handlers: dict[Any, Callable[..., Any]] = {
            **_OTHER_RULES,
            **{func: partial(ladder.gradient, func) for func in GRADIENTS},
            **ladder.handlers(),
        }

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, by its rule if it has one."""
        kwargs = kwargs or {}
        if self._recall is None or func in ASKS or func is F.multi_head_attention_forward:
            return self._run(func, classes, args, kwargs, None)
        try:
            call = self._recall.find(func, args, kwargs)
        except Departure:
            self._ladder.give_up_recall()
        result = self._run(func, classes, args, kwargs, call)
        if call is not None and type(func) in _OWN_KINDS:
            results = [result] if isinstance(result, Tensor) else tensors_in(result)
            self._recall.note(call, results)
        return result

    def _run(self, func: Any, classes: Any, args: Any, kwargs: Any, call: Call | None) -> Any:
        if self.deferred and func not in ASKS and func is not F.multi_head_attention_forward:
            tensors = tensors_in(args, kwargs)
            if self.deferred.among(tensors):
                result = self._without_values(func, classes, args, kwargs, call)
                if result is not None:
                    return result
                self.deferred.fill(tensors)
        if not torch.is_grad_enabled():
            return super().__torch_function__(func, classes, args, kwargs)
        try:
            result = None
            if func in self._handlers:
                result = self._handlers[func](*args, **kwargs)
            # Not among the handlers: in a cycle the values that were recalled would live on.
            elif func is F.multi_head_attention_forward:
                result = self._attention_layer(*args, **kwargs)
            elif func is F.dropout:
                result = self._dropout(*args, **kwargs)
            elif func in FAST_RULES or func in OF_KNOWN:
                result = self._by_rule(func, args, kwargs, call)
            if result is not None:
                return result
            result = _WITHOUT_RULE.get(func, func)(*args, **kwargs)
        except Exception as error:
            self._ladder.descend(func, args, kwargs, error)
        if type(func) not in _OWN_KINDS:
            self._ladder.require_tangents(func, args, kwargs, result)
        return result

    def _without_values(
        self, func: Any, classes: Any, args: Any, kwargs: Any, call: Call | None
    ) -> Any:
        """What reads no value of the arguments; None for what does."""
        result = None
        if not torch.is_grad_enabled():
            pass
        elif func is F.dropout:
            result = self._dropout(*args, **kwargs)
        elif (
            call
            and self._recall
            and func in OF_TANGENTS
            and (func in PUT_OFF or self._recall.value(call) is not None)
        ):
            result = self._by_rule(func, args, kwargs, call)
        if result is not None:
            return result
        if func in VIEWS:
            result = super().__torch_function__(func, classes, args, kwargs)
            if {*map(memory_of, tensors_in([result]))} <= {*map(memory_of, tensors_in(args))}:
                return result
        return None

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor | None:
        """The same draw, once for value and tangent; a value that waits goes on waiting."""
        if p == 0 or not training:
            return input
        x, dx = unpack(input)
        waits = self.deferred.among([x])
        # On a GPU it is one kernel, with which PyTorch's forward mode has no trouble.
        has_kernel = input.device.type != "cpu" and not waits
        if dx is None or inplace or has_kernel or not _is_constant(input):
            return None
        factors: Tensor = F.dropout(torch.ones_like(x), p)

        tangent = dx * factors
        known = self.deferred if waits else None
        return completed(known, tangent, [x, factors], lambda: factors.mul(x))

    def apply(self, function: Any, apply: Callable[..., Any], args: Any) -> Any:
        """Apply a custom Function to dual numbers."""
        self.deferred.fill(tensors_in(args))
        return self._ladder.apply(function, apply, args)

    def _by_rule(self, func: Any, args: Any, kwargs: Any, call: Call | None) -> Any:
        rule = FAST_RULES.get(func)
        if self._recall is None and rule is None:
            return None
        tensors = tensors_in(args, kwargs)
        if self._recall is None and func is F.linear and _is_small_layer(*tensors[:2]):
            return None
        if "out" in kwargs or not (all(map(_is_constant, tensors)) and have_tangents(tensors)):
            return None
        value = None if self._recall is None else self._recall.value(call)
        if rule is not None:
            known = self.deferred if value is None and call and func in PUT_OFF else value
            return rule(known, *args, **kwargs)
        # A view stays one: what is written to it is written to what it is of.
        if value is None or memory_of(value) in map(memory_of, tensors):
            return None
        return OF_KNOWN[func](value, *args, **kwargs)

    def _attention_layer(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return attention_layer(*args, **kwargs)


_WITHOUT_RULE = {F.scaled_dot_product_attention: in_plain_operations}
_OTHER_RULES = {func: rule for func, rule in RULES.items() if func not in FAST_RULES}
_OWN_KINDS = {
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
}
"""Of PyTorch's own functions: those that lose tangents are known by name."""


def _is_constant(tensor: Tensor | None) -> bool:
    """Whether the rules may take it: a dual number of theirs ends the graph of an inner gradient.

    The model makes such a graph when it takes a gradient in its forward, of an energy for example.
    """
    return is_plain(tensor) and (tensor is None or not tensor.requires_grad)


def _is_small_layer(input: Tensor, weight: Tensor, *_: Tensor) -> bool:
    """Where PyTorch's forward mode costs less than a rule in Python."""
    return not is_large(input) and have_tangents([weight])


@contextmanager
def tangents_follow_gradients(cache: PrimalCache, ladder: Ladder) -> Iterator[None]:
    """For forwards with dual numbers: no tangent through ``torch.no_grad``."""
    cache = cache if ladder.recalls and not ladder.needs_graph else PrimalCache()
    mode = _ForwardMode(cache, ladder)
    deferred = mode.deferred
    with no_fast_path(), mode, applied_by(mode.apply), scripts_called_by(deferred.fill):
        yield
        deferred.fill_all()


@functools.cache
def load_forward_mode() -> None:
    """What PyTorch loads at the first use of forward mode warns of a deprecation of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
