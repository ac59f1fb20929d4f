"""By what a tensor is known again: by itself, or by the memory that it lies in, and its version."""

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

_LARGE = 1 << 14  # entries, on the CPU

_Entry: TypeAlias = tuple[weakref.ref[Tensor], int, int]
"""A tensor, its version, and the token that it is known by."""


class Tokens:
    """By what a tensor is known: one number for one content, as long as nothing is written to it.

    Whatever is written to a tensor, or to a view or detached alias of it, raises the version that
    all of these share. A tensor is looked up by its identity, which is fast. Aliases of those that
    were there before are found by their memory, from :meth:`settle` on.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Entry] = {}
        self._before: list[_Entry] = []  # there before, as they were at the first look
        self._places: dict[Any, _Entry] = {}
        self._count, self._lost = itertools.count(), set[int]()

    def of(self, tensor: Tensor) -> int | None:
        """Its token; None if it is not known, or not as it is now."""
        token: int
        reference, version, token = self._known.get(id(tensor), _UNKNOWN)
        known = reference()
        if known is not tensor:
            if not self._places or not is_plain(tensor):
                return None
            reference, version, token = self._places.get(_place(tensor), _UNKNOWN)
            known = reference()
        if known is None or known._version != version or (self._lost and self.is_lost(known)):
            return None
        return token

    def give(self, tensor: Tensor, token: int) -> None:
        """Know it by this one from now on."""
        if is_plain(tensor):
            self._known[id(tensor)] = weakref.ref(tensor), tensor._version, token

    def new(self, tensor: Tensor) -> int:
        """Its token; one of its own if it has none."""
        token = self.of(tensor)
        if token is None:
            token = next(self._count)
            self.give(tensor, token)
        return token

    def of_argument(self, tensor: Tensor) -> int:
        """The same of what may have been there before."""
        is_known = self._known.get(id(tensor), _UNKNOWN)[0]() is tensor
        token = self.new(tensor)
        if not is_known and is_plain(tensor):
            self._before.append(self._known[id(tensor)])
        return token

    def there_before(self) -> Iterator[Tensor]:
        """What was an argument before it was a result, in memory that was not changed unseen."""
        for reference, _, _ in self._before:
            tensor = reference()
            if tensor is not None and not self.is_lost(tensor):
                yield tensor

    def forget(self, *tensors: Tensor) -> None:
        """Know nothing in their memory any more."""
        self._lost.update(map(memory_of, tensors))

    def is_lost(self, tensor: Tensor) -> bool:
        """Whether its memory may have been changed since."""
        return memory_of(tensor) in self._lost

    def settle(self, copies: Mapping[int, Tensor] | None = None) -> None:
        """Know what was there before as it was then or not at all, and its aliases as well.

        Args:
            copies: to be known from now on in the place of what they are copied of, by its id.
        """
        self._places.clear()
        for k, (reference, version, token) in enumerate(self._before):
            tensor = reference()
            if tensor is None:
                continue
            if tensor._version != version:
                self._known.pop(id(tensor), None)
                continue
            copy = (copies or {}).get(id(tensor))
            if copy is not None and copy.stride() == tensor.stride():
                self.give(copy, token)
                tensor, self._before[k] = copy, self._known[id(copy)]
            self._places[_place(tensor)] = self._before[k]


def _nothing() -> Any:
    """In the place of a reference to what is not there."""


_UNKNOWN: Any = (_nothing, 0, 0)


class Trace:
    """Finds a tensor again, as long as something else keeps it alive and as it was.

    A view is found through its base, which a graph that holds any view of it keeps alive.
    """

    def __init__(self, tensor: Tensor) -> None:
        base = tensor._base
        self._place = None
        if base is not None:
            self._place = tensor.size(), tensor.stride(), tensor.storage_offset()
        self._base, self._version = weakref.ref(tensor if base is None else base), tensor._version
        self._dtype = tensor.dtype

    def __call__(self) -> Tensor | None:
        """An alias of it, or None."""
        base = self._base()
        if base is None or base._version != self._version or base.dtype != self._dtype:
            return None
        if base.untyped_storage().size() == 0:  # a parameter that was gathered, and let go of
            return None
        value = base.detach()
        return value if self._place is None else value.as_strided(*self._place)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among these and in their containers."""
    return list(_tensors(values))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def is_large(tensor: Any) -> bool:
    """Whether work on it costs more than Python does, which a GPU always waits for."""
    return isinstance(tensor, Tensor) and (tensor.numel() >= _LARGE or tensor.device.type != "cpu")


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is an ordinary tensor, or none at all."""
    return tensor is None or (
        type(tensor) in _ORDINARY
        and tensor.layout is torch.strided
        and not (tensor.is_inference() or tensor.is_neg() or tensor.is_conj())
        and not _is_wrapped(tensor)
    )


_ORDINARY = {Tensor, nn.Parameter}
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by a transform of torch.func


def _place(tensor: Tensor) -> Any:
    size, stride = tensor.size(), tensor.stride()
    return memory_of(tensor), tensor.storage_offset(), size, stride, tensor.dtype


def memory_of(tensor: Tensor) -> int:
    """The same for two tensors exactly if they share memory, on every device."""
    return tensor.untyped_storage()._cdata if is_plain(tensor) else -id(tensor)
