"""What a storage holds, kept beside it, and how views of the storage see that."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from reweight._optimizers.scalars import Refused
from reweight._ranks.collectives import local

Geometry: TypeAlias = tuple[torch.Size, tuple[int, ...], int, torch.dtype]


class Held(NamedTuple):
    """What a storage holds: a value, for the view of it that has this geometry."""

    storage: torch.UntypedStorage
    value: Tensor
    geometry: Geometry


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Of the part that is in this process."""
    return (tensor if is_plain(tensor) else local(tensor)).untyped_storage()


def is_plain(tensor: Tensor) -> bool:
    """Not of a class of its own."""
    return type(tensor) in (Tensor, nn.Parameter)


def geometry_of(tensor: Tensor) -> Geometry:
    """Where in its storage the entries are."""
    return tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype


def _flat(held: Held) -> Tensor:
    """All that a storage holds, in the order of memory."""
    size, stride = held.geometry[:2]
    num_entries = held.storage.nbytes() // held.value.element_size()
    if held.value.numel() == num_entries and _is_contiguous(size, stride):
        return held.value.reshape(-1)
    return scatter(held.value.new_zeros(num_entries), held.value, held.geometry)


def viewed(held: Held, value: Tensor, tensor: Tensor) -> Tensor:
    """What is held, as a view of its storage sees it."""
    flat, dtype = _flat(held._replace(value=value)), value.dtype
    if dtype.is_complex and tensor.is_floating_point():
        flat = torch.view_as_real(flat).reshape(-1)
    elif tensor.is_complex() and dtype.is_floating_point:
        flat = torch.view_as_complex(flat.view(-1, 2))
    elif dtype != tensor.dtype:
        if flat.requires_grad:
            raise Refused("its step reads the bits of numbers, as stochastic rounding does")
        flat = flat.contiguous().view(tensor.dtype)
    if tensor.is_contiguous() and tensor.numel() == flat.numel():
        return flat.reshape(tensor.size())
    if flat.storage_offset() or not flat.is_contiguous():  # as_strided counts from the storage
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.as_strided(*geometry_of(tensor)[:3])


def _is_contiguous(size: Sequence[int], stride: Sequence[int]) -> bool:
    step = 1
    for length, one in zip(reversed(size), reversed(stride), strict=True):
        if length != 1 and one != step:
            return False
        step *= length
    return True


def scatter(flat: Tensor, value: Tensor, geometry: Geometry) -> Tensor:
    """All that a storage holds, with a value in a place of it."""
    # as_strided_scatter has a wrong derivative unless strides are contiguous (2.13, 2.14.1).
    flat.as_strided(*geometry[:3]).copy_(value)
    return flat
