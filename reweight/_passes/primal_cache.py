"""The values of a forward, for the pass that needs them again: they are not computed twice.

Both passes call the same functions. A call whose tensors are those of an earlier call, the very
same memory or what is known to hold the same, gives what that call gave: nothing is compared, on no
device, and nothing waits for one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reweight._passes.attention import attention_layer
from reweight._passes.fast_rules import RECALLED
from reweight._passes.memory import Tokens, Trace, is_large, is_plain, memory_of, tensors_in
from reweight._structure import structure_of
from reweight.batches import Batch, tensors_of

Key: TypeAlias = tuple[Any, ...]

UNSEEN = {
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.__cuda_array_interface__.__get__,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
    Tensor.set_,
    Tensor.apply_,
    Tensor.map_,
    *(
        getattr(place, name)
        for place in (torch, Tensor)
        for name in ("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")
    ),
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
    since, or may have been by way of ``.data``, NumPy or an address. Not seen is only what the loss
    function does by such a way, or compiled code, or one that holds such an address from before:
    the check of both ways, at every update, is there for that.

    Args:
        model: its buffers are known again by their names, in copies; None if they need not be.

    Attributes:
        num_entries: of the batch.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._model, self._depth = model, 0
        self._tokens, self._calls = Tokens(), defaultdict[Key, list[Call]](list)
        self._names: dict[str, int] = {}
        self._is_worth_it, self._has_noted, self.num_entries = False, False, 0

    def __enter__(self) -> "PrimalCache":
        if not self._depth and self._model is not None:
            buffers = structure_of(self._model).buffers
            self._names = {name: self._tokens.new(b) for name, b in buffers.items()}
        self._depth, self._has_noted = self._depth + 1, True
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
        if func in UNSEEN:
            tensors = tensors_in(args, kwargs)
            self._tokens.forget(*tensors)
            result = func(*args, **kwargs)
            self._tokens.forget(*tensors)  # which may lie elsewhere now
            return result
        key = key_of(func, args, kwargs, self._tokens.of_argument)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            trace = None
            if func in RECALLED and is_plain(result) and not _is_among(result, args, kwargs):
                trace = Trace(result)
                self._is_worth_it |= is_large(result) or any(map(is_large, args[:1]))
            call = Call([self._tokens.new(result)], trace)
        else:
            call = Call(list(map(self._tokens.new, tensors_in(result))), None)
        if key is not None and call.tokens:
            self._calls[key].append(call)
        return result

    def take(self, batch: Batch, copies: Batch) -> Batch:
        """Take the copies for the batch as it is now, whatever becomes of it, and return them."""
        self.num_entries = sum(tensor.numel() for tensor in tensors_of(batch))
        for tensor, copy in zip(tensors_of(batch), tensors_of(copies), strict=True):
            self._tokens.give(copy, self._tokens.of_argument(tensor))
        return copies

    def there_before(self) -> list[Tensor]:
        """What the forward read and did not make: buffers, parameters, inputs, what was kept."""
        buffers = () if self._model is None else structure_of(self._model).buffers.values()
        return [*self._tokens.there_before(), *buffers]

    def follow(self, copies: Mapping[int, Tensor]) -> None:
        """Take these copies for what they were copied of, by its id, from now on."""
        self._tokens.settle(copies)

    @property
    def is_of_no_use(self) -> bool:
        """Whether it has seen a forward in which nothing is worth recalling."""
        return self._has_noted and not self._is_worth_it

    def again(self) -> "Recall | None":
        """For a pass that does the same again; None if there is nothing that is worth it."""
        if not self._is_worth_it:
            return None
        self._tokens.settle()
        if self._model is not None:
            buffers = structure_of(self._model).buffers
            for name in self._names.keys() & buffers.keys():
                self._tokens.give(buffers[name], self._names[name])
        return Recall(self._tokens, self._calls)


def key_of(
    func: Any, args: Any, kwargs: dict[str, Any], token_of: Callable[[Tensor], int | None]
) -> Key | None:
    """What tells a call from others; None if that cannot be told."""
    if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training")):
        # Whose running statistics have no say in what it comes to.
        args, kwargs = (args[0], *args[3:]), {**kwargs, "running_mean": 0, "running_var": 0}
    parts, tensors = [func], list[Tensor]()
    known = False not in [_write(each, parts, tensors, token_of) for each in args]
    for name, value in kwargs.items():
        parts.append(name)
        known = _write(value, parts, tensors, token_of) and known
    if not known or func in _UNDEFINED or not (tensors or func in _FACTORIES):
        return None
    device = tensors[0].device.type if tensors else "cpu"
    if torch.is_autocast_enabled(device):
        parts.append(torch.get_autocast_dtype(device))
    return tuple(parts)


def _write(
    value: Any, parts: list[Any], tensors: list[Tensor], token_of: Callable[[Tensor], int | None]
) -> bool:
    """Add an argument to the parts of a key, if it is known; what follows a type is of it."""
    kind = type(value)
    if kind in _CONSTANTS:
        parts += kind, value
    elif isinstance(value, Tensor):
        tensors.append(value)
        token = token_of(value)
        parts += Tensor, token
        return token is not None
    elif kind is float:
        parts += float, value or str(value)  # 0 is not −0
    elif kind in (tuple, list, torch.Size):
        parts += kind, len(value)
        return False not in [_write(each, parts, tensors, token_of) for each in value]
    elif kind is dict:
        parts += dict, tuple(value)
        return False not in [_write(each, parts, tensors, token_of) for each in value.values()]
    elif kind is slice:
        return _write((slice, value.start, value.stop, value.step), parts, tensors, token_of)
    else:
        return False
    return True


def _is_among(tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
    return any(tensor is each for each in tensors_in(args, kwargs))


class Departure(Exception):
    """The pass does something else than the forward did; it is to be run without recall."""


class Call(NamedTuple):
    """One of the forward's.

    Attributes:
        tokens: what its results are known by.
        result: where the one result is found; None if it is not wanted, or one of the arguments.
    """

    tokens: list[int]
    result: Trace | None


class Recall:
    """One pass that does again what the forward did: each of its calls finds that of the forward.

    Of equal calls the first is the first, for they may have drawn random numbers.
    """

    def __init__(self, tokens: Tokens, calls: Mapping[Key, list[Call]]) -> None:
        self._tokens, self._calls = tokens, calls
        self._next: Counter[Key] = Counter()
        self._lent: list[Tensor] = []  # memory of the forward that was given back

    def find(self, func: Any, args: Any, kwargs: Any) -> Call | None:
        """The call of the forward that was this one.

        Raises:
            Departure: it would change what the graph of the losses holds.
        """
        if _may_write(func, kwargs):
            tensors = tensors_in(args, kwargs)
            if not set(map(memory_of, self._lent)).isdisjoint(map(memory_of, tensors)):
                raise Departure
            if func in UNSEEN:
                self._tokens.forget(*tensors)
                return None
        key = key_of(func, args, kwargs, self._tokens.of)
        calls = None if key is None else self._calls.get(key)
        if key is None or calls is None or self._next[key] >= len(calls):
            return None
        self._next[key] += 1
        return calls[self._next[key] - 1]

    def value(self, call: Call | None) -> Tensor | None:
        """What the call came to; None if it has gone, or was changed since."""
        value = None if call is None or call.result is None else call.result()
        if value is None or self._tokens.is_lost(value):
            return None
        self._lent.append(value)
        return value

    def note(self, call: Call, results: list[Tensor]) -> None:
        """What came of it this time is known as what came of it then."""
        for result, token in zip(results, call.tokens, strict=False):
            self._tokens.give(result, token)


def _may_write(func: Any, kwargs: Any) -> bool:
    """Whether a function may change what it is given."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    assigns = name.startswith(("__i", "__set")) and name not in ("__int__", "__index__")
    return in_place or assigns or func in UNSEEN or "out" in kwargs or bool(kwargs.get("inplace"))
