"""The forward-mode pass with less arithmetic than PyTorch's own, and the same result.

Its values are those of the first forward, as far as they are still there; what is left of it are
the products of the tangents.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from reweight._passes.custom_functions import applied_by
from reweight._passes.eager import attention_layer
from reweight._passes.fast_rules import BY_OUTPUT, BY_TANGENT, FAST_RULES
from reweight._passes.ladder import GRADIENTS, Ladder
from reweight._passes.memory import is_plain, tensors_in
from reweight._passes.norm_rules import Known
from reweight._passes.operations import have_tangents
from reweight._passes.primal_cache import ASKS, PrimalCache, argument
from reweight._passes.recall import Call, Departure
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
        self._recall, self._ladder = cache.again(BY_TANGENT, BY_OUTPUT), ladder
        self._handlers: dict[Any, Callable[..., Any]] = {
            **{func: rule for func, rule in RULES.items() if func not in FAST_RULES},
            **{func: partial(ladder.gradient, func) for func in GRADIENTS},
            F.multi_head_attention_forward: self._attention_layer,
            **ladder.handlers(),
        }

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, by its rule if it has one."""
        kwargs = kwargs or {}
        if func in ASKS or func is F.multi_head_attention_forward:
            return self._run(func, classes, args, kwargs)[0]
        tensors = tensors_in(args, kwargs)
        try:
            call, lacks = self._recall.find(func, args, kwargs, tensors)
            result, waits = self._run(func, classes, args, kwargs, call, lacks)
            if call is not None:
                self._recall.note(call, tensors, tensors_in(result), waits=waits)
        except Departure:
            self._ladder.give_up_recall()
        return result

    def _run(
        self,
        func: Any,
        classes: Any,
        args: Any,
        kwargs: Any,
        call: Call | None = None,
        lacks: bool = False,
    ) -> tuple[Any, bool]:
        """What comes of it, and whether its value is left out; not if it lacks that of another."""
        if not torch.is_grad_enabled():
            if lacks:
                raise Departure
            return super().__torch_function__(func, classes, args, kwargs), False
        try:
            if func in self._handlers:
                result = self._handlers[func](*args, **kwargs)
                if result is not None:
                    return result, False
            elif func in FAST_RULES and not (call and call.is_view):
                result = self._by_rule(func, args, kwargs, call)
                if result is not None:
                    return result, call is not None and call.waits
            if lacks and not (call and call.is_view):
                raise Departure
            result = func(*args, **kwargs)
        except Departure:
            raise
        except Exception as error:
            if lacks:  # which may lie in memory in another way
                raise Departure from error
            self._ladder.descend(func, args, kwargs, error)
        if type(func) not in _OWN_KINDS:
            self._ladder.require_tangents(func, args, kwargs, result)
        return result, False

    def _by_rule(self, func: Any, args: Any, kwargs: Any, call: Call | None) -> Any:
        tensors = tensors_in(args, kwargs)
        if not all(map(_is_constant, tensors)):
            return None
        value = None if call is None else self._recall.value(call)
        if not have_tangents(tensors):
            return value if call is not None and call.held and func is not F.dropout else None
        known = Known() if call is None else Known(value, call.node, call.waits)
        result = FAST_RULES[func](known, *args, **kwargs)
        if func is F.batch_norm and result is not None and value is not None:
            names = "running_mean", "running_var"
            self._recall.unchanged(*(argument(args, kwargs, i + 1, n) for i, n in enumerate(names)))
        return result

    def _attention_layer(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return attention_layer(*args, **kwargs)


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


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain operations: fused kernels have no forward mode and no double backward."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def tangents_follow_gradients(cache: PrimalCache, ladder: Ladder) -> Iterator[None]:
    """For forwards with dual numbers: plain attention, no tangent through ``torch.no_grad``."""
    cache = cache if ladder.recalls and not ladder.needs_graph else PrimalCache()
    with plain_attention(), _ForwardMode(cache, ladder), applied_by(ladder.apply):
        yield


@functools.cache
def load_forward_mode() -> None:
    """What PyTorch loads at the first use of forward mode warns of a deprecation of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
