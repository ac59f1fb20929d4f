"""Values that are computed only if something reads them.

What the graph of the losses does not keep, no derivative needs. So where a product has gone since
the forward, mostly nobody asks for it again: all that follows takes its tangent alone.

Whoever reads a value is seen: functions by their mode, custom Functions and TorchScript before they
run. Extensions in C++ that are neither are not; the check of both ways is there for that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from reweight._passes.memory import is_plain, memory_of


class _Place(NamedTuple):
    """Memory that waits for its value, how that is computed, and of what, in which version."""

    memory: StorageWeakRef
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]
    given: list[tuple[Tensor, int]]


class Deferred:
    """Places of values that nothing has asked for yet.

    Args:
        give_up: called, not to return, where a value cannot be had any more.
    """

    def __init__(self, give_up: Callable[[], NoReturn]) -> None:
        self._places: dict[int, _Place] = {}
        self._give_up = give_up

    def __bool__(self) -> bool:
        return bool(self._places)

    def put_off(
        self, like: Tensor, given: Sequence[Tensor | None], compute: Callable[[], Tensor]
    ) -> Tensor:
        """A tensor whose entries are undefined until it is filled.

        Args:
            like: has its shape, dtype and strides.
            given: what it is computed of, and may wait itself.
            compute: gives its value, without tangents.
        """
        self._places = {key: p for key, p in self._places.items() if not p.memory.expired()}
        place = torch.empty_like(like)
        device, enabled = like.device.type, torch.is_autocast_enabled(like.device.type)

        kept = [tensor for tensor in given if tensor is not None]

        def compute_as_here() -> Tensor:
            self.fill(kept)
            with torch.autocast(device, torch.get_autocast_dtype(device), enabled):
                return compute()

        self._places[memory_of(place)] = _Place(
            # The struct of memory that a weak reference holds is not given to another.
            StorageWeakRef(place.untyped_storage()),
            place.size(),
            place.stride(),
            place.dtype,
            compute_as_here,
            [(tensor, tensor._version) for tensor in kept],
        )
        return place

    def among(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these may wait for its value."""
        return any(not is_plain(t) or memory_of(t) in self._places for t in tensors)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Let these have their values."""
        if not all(map(is_plain, tensors)):  # others may lie in it
            self.fill_all()
        for tensor in tensors:
            self._fill(memory_of(tensor))

    def fill_all(self) -> None:
        """Let all have their values that are still there."""
        for key in reversed(list(self._places)):  # those that have gone keep others
            self._fill(key)

    def _fill(self, key: int) -> None:
        place = self._places.pop(key, None)
        memory = None if place is None else torch.UntypedStorage._new_with_weak_ptr(key)
        if place is None or memory is None:
            return
        if any(tensor._version != version for tensor, version in place.given):
            self._give_up()
        modes_off = torch._C.DisableTorchFunction()
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False), modes_off:
            value = torch.empty(0, dtype=place.dtype, device=memory.device)
            value.set_(memory, 0, place.size, place.stride)
            value.copy_(place.compute())
