"""The values of a forward, for the pass that needs them again: they are not computed twice.

Both passes call the same functions. A call whose tensors are those of an earlier call, the very
same memory or what is known to hold the same, gives what that call gave: nothing is compared, on no
device, and nothing waits for one.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reweight._passes.eager import attention_layer
from reweight._passes.memory import Tokens, memory_of, tensors_in, version_of
from reweight._passes.recall import UNSEEN, Call, Key, Recall
from reweight.batches import Batch, tensors_of

ASKS = {
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_nested", "requires_grad", "is_cuda")
    ),
}
"""What gives no tensor."""

_FACTORIES = {torch.arange, torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace}
"""Made of numbers alone, and always the same."""

_CONSTANTS = {
    *(bool, int, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}


class PrimalCache(TorchFunctionMode):
    """What the functions of a forward came to: as a context it takes note, then it is asked.

    A result is given back, as it is, only for the very same arguments. Nothing is kept alive for
    that: what the graph of the losses does not hold is forgotten, and so is memory that was changed
    since, or may have been by way of ``.data``, NumPy or an address. A result that has gone, and
    whose value no tangent needs, is not computed again either: memory of its shape, with nothing
    in it, stands for it.

    Args:
        model: its buffers are known again by their names, in copies; None if they need not be.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._model, self._depth = model, 0
        self._tokens, self._calls = Tokens(), defaultdict[Key, list[Call]](list)
        self._order: list[Call] = []
        self._readers = defaultdict[int, list[Call]](list)
        self._needed: set[int] = set()  # tokens of what someone reads who is not known
        self._is_whole = True  # every function was seen
        self._names: dict[str, int] = {}

    def __enter__(self) -> "PrimalCache":
        if not self._depth and self._model is not None:
            self._names = {n: self._tokens.new(b) for n, b in self._model.named_buffers()}
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if not self._depth:
            for call in self._order:
                call.had_gone = not all(trace.is_there() for trace in call.traces)

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, and takes note of what it came to."""
        kwargs = kwargs or {}
        if func in ASKS:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return attention_layer(*args, **kwargs)
        tensors, key, tokens = tensors_in(args, kwargs), None, []
        for tensor in tensors:
            token = self._tokens.of(tensor)
            if token is None:
                self._is_whole &= tensor.grad_fn is None
                token = self._tokens.new(tensor)
            tokens.append(token)
        if func in UNSEEN:
            self._tokens.forget(tensors[0])
        else:
            key = self._key(func, args, kwargs)
        versions = list(map(version_of, tensors))
        result = func(*args, **kwargs)
        results = tensors_in(result)
        changed = [t for t, v in zip(tensors, versions, strict=True) if version_of(t) != v]
        outputs = [self._tokens.of_or_new(each) for each in (*results, *changed)]
        if key is None or not results:
            self._needed.update(tokens)
            return result
        memory = {memory_of(tensor) for tensor in tensors}
        is_view = not changed and all(memory_of(each) in memory for each in results)
        call = Call(func, results, outputs, is_view=is_view)
        self._calls[key].append(call)
        self._order.append(call)
        for token in tokens:
            self._readers[token].append(call)
        return result

    def take(self, batch: Batch, copies: Batch) -> Batch:
        """Take the copies for the batch as it is now, whatever becomes of it, and return them."""
        for tensor, copy in zip(tensors_of(batch), tensors_of(copies), strict=True):
            self._tokens.give(copy, self._tokens.of_or_new(tensor))
        return copies

    def follow(self, copies: Mapping[int, Tensor]) -> None:
        """Take these copies for what they were copied of, by its id, from now on."""
        for original, token in self._tokens.there():
            copy = copies.get(id(original))
            if copy is not None and copy.stride() == original.stride():
                self._tokens.give(copy, token)

    def again(self, by_tangent: set[Any], by_output: set[Any]) -> "Recall":
        """For a pass that does the same again.

        Args:
            by_tangent: functions whose tangent needs no value.
            by_output: those whose tangent needs the value that they come to alone.
        """
        for call in reversed(self._order):
            call.held = all(t.is_there() and not self._tokens.is_lost(t) for t in call.traces)
            readers = [r for token in call.tokens for r in self._readers[token] if r is not call]
            known = call.is_view or call.func in by_tangent
            call.waits = (
                (call.had_gone and not call.held and self._is_whole)
                and bool(readers)
                and call.func not in by_output
                and self._needed.isdisjoint(call.tokens)
                and all(reader.spares for reader in readers)
            )
            call.spares = call.has_graph and (
                (call.held and (known or call.func in by_output)) or (call.waits and known)
            )
        if self._model is not None:
            buffers = dict(self._model.named_buffers())
            for name in self._names.keys() & buffers.keys():
                self._tokens.give(buffers[name], self._names[name])
        return Recall(self._tokens, self._calls, self._key)

    def _key(self, func: Any, args: Any, kwargs: Any) -> Key | None:
        """What tells the call from others; None if that cannot be told."""
        if func is F.batch_norm and argument(args, kwargs, 5, "training"):
            # Whose running statistics have no say in what it comes to.
            args, kwargs = (args[0], *args[3:]), {**kwargs, "running_mean": 0, "running_var": 0}
        try:
            parts = self._frozen(args), self._frozen(kwargs)
        except _UnknownError:
            return None
        if func not in _FACTORIES and not tensors_in(args, kwargs):
            return None
        device = next((t.device.type for t in tensors_in(args, kwargs)), "cpu")
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return func, parts, autocast

    def _frozen(self, value: Any) -> Hashable:
        kind = type(value)
        if isinstance(value, Tensor):
            token = self._tokens.of(value)
            if token is None:
                raise _UnknownError
            return Tensor, token
        if kind in _CONSTANTS:
            return kind, value
        if kind is float:
            return kind, value.hex()  # 0 is not −0
        if kind in (tuple, list, torch.Size):
            return kind, *map(self._frozen, value)
        if kind is dict:
            return *value, *map(self._frozen, value.values())
        if kind is slice:
            return slice, *map(self._frozen, (value.start, value.stop, value.step))
        raise _UnknownError


class _UnknownError(Exception):
    """An argument was not there before."""


def argument(args: Any, kwargs: Any, index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)
