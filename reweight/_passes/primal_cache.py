"""The values of a forward, for the pass that needs them again: they are not computed twice.

Both passes call the same functions. A call whose tensors are those of an earlier call, the very
same memory or what is known to hold the same, gives what that call gave: nothing is compared, on no
device, and nothing waits for one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reweight._passes.eager import attention_layer
from reweight._passes.memory import Tokens, Trace, memory_of, tensors_in, version_of
from reweight.batches import Batch, tensors_of

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

_UNDEFINED = {
    torch.empty_like,
    Tensor.new_empty,
    Tensor.new_empty_strided,
    Tensor.resize_,
    Tensor.resize_as_,
}
"""Hold anything, until someone fills them who may not be seen."""


class PrimalCache(TorchFunctionMode):
    """What the functions of a forward came to: as a context it takes note, then it is asked.

    A result is given back, as it is, only for the very same arguments. Nothing is kept alive for
    that: what the graph of the losses does not hold is forgotten, and so is memory that was changed
    since, or may have been by way of ``.data``, NumPy or an address. Only what the loss function
    does by such a way, or compiled code, is not seen.

    Args:
        model: its buffers are known again by their names, in copies; None if they need not be.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._model, self._depth = model, 0
        self._tokens, self._calls = Tokens(), defaultdict[Key, list[Call]](list)
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
        tensors, key = tensors_in(args, kwargs), None
        for tensor in tensors:
            self._tokens.of_or_new(tensor)
        if func in UNSEEN:
            self._tokens.forget(tensors[0])
        else:
            key = self._key(func, args, kwargs)
        versions = list(map(version_of, tensors))
        result = func(*args, **kwargs)
        changed = [t for t, v in zip(tensors, versions, strict=True) if version_of(t) != v]
        results = tensors_in(result)
        tokens = [self._tokens.of_or_new(each) for each in results]
        if key is not None and results:
            self._calls[key].append(Call(tokens, None if changed else Trace(results[0])))
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

    def again(self) -> "Recall":
        """For a pass that does the same again."""
        if self._model is not None:
            buffers = dict(self._model.named_buffers())
            for name in self._names.keys() & buffers.keys():
                self._tokens.give(buffers[name], self._names[name])
        return Recall(self._tokens, self._calls, self._key)

    def _key(self, func: Any, args: Any, kwargs: Any) -> Key | None:
        """What tells the call from others; None if that cannot be told."""
        training = args[5] if len(args) > 5 else kwargs.get("training")
        if func is F.batch_norm and training:
            # Whose running statistics have no say in what it comes to.
            args, kwargs = (args[0], *args[3:]), {**kwargs, "running_mean": 0, "running_var": 0}
        try:
            parts = self._frozen(args), self._frozen(kwargs)
        except _UnknownError:
            return None
        if func in _UNDEFINED or (func not in _FACTORIES and not tensors_in(args, kwargs)):
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


class Departure(Exception):
    """The pass does something else than the forward did; it is to be run without recall."""


class Call(NamedTuple):
    """One of the forward's.

    Attributes:
        tokens: what its results are known by.
        result: where the first of them is found; None if it changed an argument.
    """

    tokens: list[int]
    result: Trace | None


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
        self._lent: set[int] = set()  # memory of the forward that was given back

    def find(self, func: Any, args: Any, kwargs: Any) -> Call | None:
        """The call of the forward that was this one.

        Raises:
            Departure: it would change what the graph of the losses holds.
        """
        if not self._calls:
            return None
        if _may_write(func, kwargs):
            tensors = tensors_in(args, kwargs)
            if not self._lent.isdisjoint(map(memory_of, tensors)):
                raise Departure
            if func in UNSEEN:
                self._tokens.forget(tensors[0])
                return None
        key = self._key(func, args, kwargs)
        calls = () if key is None else self._calls.get(key, ())
        if self._next[key] >= len(calls):
            return None
        self._next[key] += 1
        return calls[self._next[key] - 1]

    def value(self, call: Call | None) -> Tensor | None:
        """What the call came to; None if it has gone, or was changed since."""
        trace = None if call is None or len(call.tokens) != 1 else call.result
        if trace is None or not trace.is_there() or self._tokens.is_lost(trace):
            return None
        value = trace()
        self._lent.add(memory_of(value))
        return value

    def note(self, call: Call, results: list[Tensor]) -> None:
        """What came of it this time is known as what came of it then."""
        for result, token in zip(results, call.tokens, strict=False):
            if self._tokens.of(result) is None:
                self._tokens.give(result, token)


def _may_write(func: Any, kwargs: Any) -> bool:
    """Whether a function may change what it is given."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    assigns = name.startswith(("__i", "__set")) and name not in ("__int__", "__index__")
    return in_place or assigns or func in UNSEEN or "out" in kwargs or bool(kwargs.get("inplace"))
