"""What a forward came to, call by call, in a pass that does the same again."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reweight._passes.memory import Tokens, Trace, memory_of

Key: TypeAlias = Hashable

UNSEEN = {
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
}
"""Ways to memory by which it may be changed without a trace: the version of the tensor stays."""

_NORMS = F.batch_norm, F.layer_norm


class Departure(Exception):
    """The pass does something else than the forward did; it is to be run without recall."""


class Call:
    """One of the forward's.

    Attributes:
        func: what was called.
        tokens: what its results are known by, and after them arguments that it changed.
        node: of the first result's graph.
        held: whether its results are still there.
        spares: whether its tangent can do without the values of its arguments.
        waits: whether no one needs its value.
    """

    def __init__(self, func: Any, results: list[Tensor], tokens: list[int], *, is_view: bool):
        self.func, self.tokens, self.is_view = func, tokens, is_view
        self.traces = [Trace(result) for result in results]
        # Unpacking what hooks have packed, as checkpoints do, might run a part of the model.
        self.node = None if _has_hooks() or func not in _NORMS else results[0].grad_fn
        self.has_graph = torch.is_grad_enabled()
        self.had_gone = self.held = self.spares = self.waits = False


class Recall:
    """One pass that does again what the forward did: each of its calls finds that of the forward.

    Of equal calls the first is the first, for they may have drawn random numbers.
    """

    def __init__(
        self,
        tokens: Tokens,
        calls: Mapping[Key, list[Call]],
        key: Callable[[Any, Any, Any], Key | None],
    ) -> None:
        self._tokens, self._calls, self._key = tokens, calls, key
        self._next: Counter[Key] = Counter()
        self._absent: set[int] = set()  # tokens of what holds nothing
        self._lent: set[int] = set()  # memory of the forward that was given back
        self._stale: set[int] = set()  # memory that was to change and has not

    def find(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> tuple[Call | None, bool]:
        """The call of the forward that was this one, and whether an argument holds nothing.

        Raises:
            Departure: it is none, and one with these arguments must not be run.
        """
        memory = set(map(memory_of, tensors))
        if not (memory.isdisjoint(self._stale) or func is F.batch_norm):
            raise Departure
        if not memory.isdisjoint(self._lent) and _may_write(func, kwargs):
            raise Departure
        key = self._key(func, args, kwargs)
        calls = () if key is None else self._calls.get(key, ())
        call = None
        if self._next[key] < len(calls):
            call = calls[self._next[key]]
            self._next[key] += 1
        lacks = self._has_absent(tensors)
        if lacks and not (call and call.spares):
            raise Departure
        return call, lacks

    def value(self, call: Call) -> Tensor | None:
        """What the call came to; memory of its shape if no one needs it; None if it has gone."""
        trace = call.traces[0]
        if len(call.traces) != 1 or not (call.held or call.waits):
            return None
        if call.waits:
            return trace.like()
        value = trace()
        self._lent.add(memory_of(value))
        return value

    def unchanged(self, *tensors: Tensor | None) -> None:
        """These were to be changed, and were not: nobody else may look at them."""
        self._stale.update(memory_of(tensor) for tensor in tensors if tensor is not None)

    def note(
        self, call: Call, tensors: list[Tensor], results: list[Tensor], *, waits: bool
    ) -> None:
        """What came of it this time is known as what came of it then."""
        waits |= call.is_view and self._has_absent(tensors)
        for result, token in zip(results, call.tokens, strict=False):
            if self._tokens.of(result) is None:
                self._tokens.give(result, token)
            if waits:
                self._absent.add(token)

    def _has_absent(self, tensors: list[Tensor]) -> bool:
        return bool(self._absent) and any(self._tokens.of(t) in self._absent for t in tensors)


def _has_hooks() -> bool:
    """Whether what graphs save is packed by hooks; so it is taken where PyTorch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
    return top(True) is not None


def _may_write(func: Any, kwargs: Any) -> bool:
    """Whether a function may change what it is given."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    assigns = name.startswith(("__i", "__set")) and name not in ("__int__", "__index__")
    return in_place or assigns or func in UNSEEN or "out" in kwargs or bool(kwargs.get("inplace"))
