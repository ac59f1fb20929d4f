"""By what a tensor is known again, on any device: the memory that it lies in, and its version."""

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class _Place(NamedTuple):
    memory: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Tokens:
    """By what a tensor is known: one number for one content, as long as its memory is as it was."""

    def __init__(self) -> None:
        self._known: dict[_Place, tuple[weakref.ref[Tensor], int, int]] = {}
        self._count, self._lost = itertools.count(), set[int]()

    def of(self, tensor: Tensor) -> int | None:
        """Its token; None if it is not known, or not as it is now."""
        if not is_plain(tensor):
            return None
        place = _place(tensor)
        reference, version, token = self._known.get(place, (_nothing, 0, 0))
        base = reference()
        same = base is not None and base._version == version and memory_of(base) == place.memory
        return token if same and place.memory not in self._lost else None

    def give(self, tensor: Tensor, token: int) -> None:
        """Know it by this one from now on."""
        if is_plain(tensor):
            base = _base(tensor)
            self._known[_place(tensor)] = weakref.ref(base), base._version, token

    def new(self, tensor: Tensor) -> int:
        """Know it by one of its own."""
        token = next(self._count)
        self.give(tensor, token)
        return token

    def of_or_new(self, tensor: Tensor) -> int:
        """Its token, one of its own if it has none."""
        token = self.of(tensor)
        return self.new(tensor) if token is None else token

    def forget(self, tensor: Tensor) -> None:
        """Know nothing in its memory any more."""
        self._lost.add(memory_of(tensor))

    def is_lost(self, trace: "Trace") -> bool:
        """Whether its memory may have been changed since."""
        return trace.memory in self._lost

    def there(self) -> list[tuple[Tensor, int]]:
        """What is known and in memory of its own."""
        bases = [(reference(), token) for reference, _, token in self._known.values()]
        return [(b, token) for b, token in bases if b is not None and self.of(b) == token]


class Trace:
    """Finds a tensor again, as long as something else keeps it alive and as it was.

    A view is found through its base, which a graph that holds any view of it keeps alive.
    """

    def __init__(self, tensor: Tensor) -> None:
        base = _base(tensor)
        self._base, self._version, self._place = weakref.ref(base), version_of(base), None
        self._is_whole = base is tensor
        if is_plain(tensor):
            self._place = _place(tensor)

    @property
    def memory(self) -> int | None:
        """Where it is, or was."""
        return None if self._place is None else self._place.memory

    def is_there(self) -> bool:
        base = self._base()
        return (
            base is not None
            and self._place is not None
            and base._version == self._version
            and memory_of(base) == self._place.memory
            and base.untyped_storage().size() > 0  # a parameter that was gathered, and let go of
        )

    def __call__(self) -> Tensor:
        base, place = self._base(), self._place
        assert base is not None
        assert place is not None
        value = base.detach()
        return value if self._is_whole else value.as_strided(place.size, place.stride, place.offset)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among these and in their containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is an ordinary tensor, or none at all."""
    kinds = (Tensor, nn.Parameter)
    return tensor is None or (
        type(tensor) in kinds
        and tensor.layout == torch.strided
        and not (tensor.is_inference() or tensor.is_neg() or tensor.is_conj())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _place(tensor: Tensor) -> _Place:
    offset, size, stride = int(tensor.storage_offset()), tensor.size(), tensor.stride()
    return _Place(memory_of(tensor), offset, size, stride, tensor.dtype)


def memory_of(tensor: Tensor) -> int:
    """The same for two tensors exactly if they share memory, on every device."""
    return tensor.untyped_storage()._cdata if is_plain(tensor) else -id(tensor)


def version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _nothing() -> None:
    """In the place of a reference to what is not there."""
