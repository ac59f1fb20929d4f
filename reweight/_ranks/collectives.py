"""A step on several ranks is one on their joined batch: what they add up and gather for that.

Within :func:`joined` a mean over samples is one over those of all ranks, and every rank has its
part of it: the parts add up to the whole. Anywhere else, and in a single process, each function
here gives back what it was given.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_GROUP: ContextVar[Any] = ContextVar("group", default=None)


@contextmanager
def joined(group: Any) -> Iterator[None]:
    """The ranks of this process group work on one batch; on their own if it is None, or of one."""
    alone = group is None or dist.get_world_size(group) == 1
    token = _GROUP.set(None if alone else group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def num_ranks() -> int:
    """How many ranks work on the batch."""
    group = _GROUP.get()
    return 1 if group is None else dist.get_world_size(group)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of what each rank has, differentiably: a gradient is that of all ranks' results."""
    (result,) = sums_over_ranks([tensor])
    return result


def sums_over_ranks(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The sum of each, differentiably, in one call for each dtype; shards are sums as they are."""
    group = _GROUP.get()
    if group is None or any(map(is_sharded, tensors)):
        return tuple(tensors)
    results: tuple[Tensor, ...] = _Sums.apply(group, *tensors)  # type: ignore[no-untyped-call]
    return results


def sums_by_name(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of what the ranks have by each name; names that no rank has are left out.

    Args:
        tensors: by name.
        like: names and shapes of all there may be, the same on every rank.
    """
    if _GROUP.get() is None or any(map(is_sharded, like.values())):
        return dict(tensors)
    filled = [tensors[n] if n in tensors else torch.zeros_like(like[n]) for n in like]
    counts = torch.tensor([n in tensors for n in like], dtype=filled[0].dtype)
    *sums, counts = sums_over_ranks([*filled, counts.to(filled[0].device, non_blocking=True)])
    # Looking waits for the device: only where a parameter took no part, on this rank at least.
    present = [True] * len(like) if len(tensors) == len(like) else (counts > 0).tolist()
    return {n: total for n, total, there in zip(like, sums, present, strict=True) if there}


def gather(tensor: Tensor) -> Tensor:
    """What each rank has, of the same shape on all, stacked in the order of the ranks."""
    group = _GROUP.get()
    if group is None:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(num_ranks())]
    dist.all_gather(parts, tensor.contiguous(), group)
    return torch.stack(parts)


def gather_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """The rows of all ranks, which may have different numbers, and where one's own are."""
    group = _GROUP.get()
    if group is None:
        return tensor, slice(None)
    sizes = gather(torch.tensor(len(tensor), device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    rows = torch.cat([part[:size] for part, size in zip(gather(padded), sizes, strict=True)])
    start = sum(sizes[: dist.get_rank(group)])
    return rows, slice(start, start + len(tensor))


def require_same(facts: Mapping[str, Any], device: torch.device) -> None:
    """Raise ValueError on every rank unless these values are the same on all.

    Args:
        facts: what must agree, by name: state dicts of tensors, or plain values.
        device: one that the process group can send from.
    """
    every = gather(torch.tensor([_fingerprint(fact) for fact in facts.values()], device=device))
    differs = every != every[0]
    if differs.any():
        rank, which = (int(index) for index in differs.nonzero()[0])
        raise ValueError(
            f"{list(facts)[which]} must be the same on every rank, got another on rank {rank} than "
            "on rank 0. Give all ranks the same arguments, and call torch.manual_seed with one "
            "seed on all of them before the reweighter is made, or load one state dict into it."
        )


class _Sums(torch.autograd.Function):
    """All-reduces of flattened tensors. What is a sum over ranks forward is one backward."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        results: list[Tensor] = list(tensors)
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=group)
            parts = flat.split([tensors[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                results[i] = part.view(tensors[i].shape)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Sums.apply(ctx.group, *gradients))  # type: ignore[no-untyped-call]


def _fingerprint(fact: Any) -> int:
    digest = hashlib.sha256()
    for name, value in fact.items() if isinstance(fact, Mapping) else [("", fact)]:
        digest.update(f"{name}:".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a part."""
    if type(tensor) is Tensor:
        return False
    loaded = sys.modules.get("torch.distributed.tensor")  # slow to import, for nothing mostly
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, without a graph, or a plain tensor as it is."""
    result: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return result
