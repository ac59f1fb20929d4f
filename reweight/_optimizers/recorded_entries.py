"""A recorded step that goes entry by entry: many small parameters go through it as one.

Then ∂θ̂/∂g is one slope for each entry, and nothing else is kept for the way back.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim

from reweight._optimizers.entries import SMALL, joined, parted
from reweight._optimizers.recorded_step import How, recorded_step
from reweight._ranks.collectives import local


class Slopes(NamedTuple):
    """θ̂ and ∂θ̂/∂g, by the id of the parameter; the entries that are in this process."""

    values: dict[int, Tensor]
    slopes: dict[int, Tensor]


class _Pack(NamedTuple):
    """Parameters of a group that go through the step as one."""

    group: int
    members: list[Tensor]

    def gathered(self, kept: Iterable[Tensor]) -> Tensor:
        """What is kept for each of them, as one."""
        tensors = list(map(local, kept))
        if len(tensors) == 1:
            return tensors[0]
        ones = [1] * (tensors[0].dim() - 1)  # for steps that ask for the dimension
        return joined(tensors).view(-1, *ones)


def entry_by_entry(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], how: How
) -> Slopes | None:
    """The next step and its slopes; None if it is not one that goes entry by entry.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none.
        how: what the class bears.
    """
    packs = _packs(optimizer, gradients)
    if packs is None:
        return None
    some = object.__new__(type(optimizer))
    some.__dict__.update(vars(optimizer))
    some.state = defaultdict(dict)
    some.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    for group in some.param_groups:
        group.pop("param_names", None)
    given = {key: gradient.detach() for key, gradient in gradients.items() if gradient is not None}
    leaves: dict[int, Tensor] = {}
    for pack in packs:
        first = pack.members[0]
        new = nn.Parameter(pack.gathered(p.detach() for p in pack.members), first.requires_grad)
        some.param_groups[pack.group]["params"].append(new)
        for name, value in optimizer.state.get(first, {}).items():
            if isinstance(value, Tensor) and value.shape == first.shape:
                value = pack.gathered(optimizer.state[p][name] for p in pack.members)
            some.state[new][name] = value
        leaves[id(new)] = pack.gathered(given[id(p)] for p in pack.members).requires_grad_()
    try:
        parameters, recorder = recorded_step(some, leaves, how)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for what joined parameters have not
        return None
    if not recorder.is_entrywise or recorder.is_widened:
        return None
    moved = [parameters[key] for key in leaves]
    slopes = [torch.zeros_like(m) for m in moved]
    if differentiable := [m for m in moved if m.requires_grad]:
        inputs, ones = list(leaves.values()), [torch.ones_like(m) for m in differentiable]
        slopes = list(
            torch.autograd.grad(
                differentiable, inputs, ones, allow_unused=True, materialize_grads=True
            )
        )
    found = Slopes({}, {})
    for pack, *both in zip(packs, moved, slopes, strict=True):
        like = [local(p) for p in pack.members]
        for whole, kept in zip(both, found, strict=True):
            parts = parted(whole.detach().view(-1) if len(like) > 1 else whole.detach(), like)
            kept.update(zip(map(id, pack.members), parts, strict=True))
    return found


def _packs(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None]
) -> list[_Pack] | None:
    """None where the optimizer holds more than numbers beside what it holds of each entry."""
    held = vars(optimizer)
    if not all(_is_number(value) for name, value in held.items() if name not in _PARTS):
        return None
    packs: list[_Pack] = []
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        settings = (value for name, value in group.items() if name not in _PARTS)
        if group.get("fused") or not all(map(_is_number, settings)):
            return None
        for p in group["params"]:
            gradient = gradients.get(id(p))
            if gradient is None:
                continue
            like = _like(p, optimizer.state.get(p, {}))
            if like is None or gradient.layout is not torch.strided:
                return None
            mine = local(p)
            if mine.numel() > SMALL or not mine.is_contiguous() or not p.dim():
                packs.append(_Pack(number, [p]))
            else:
                alike[(number, *like)].append(p)
    return packs + [_Pack(key[0], members) for key, members in alike.items()]


_PARTS = ("param_groups", "state", "params", "param_names", "step")


def _like(p: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What those that go as one have alike; None if the state is not of entries and numbers."""
    if vars(p) or p.is_complex():
        return None
    found: list[Any] = [p.dim(), p.dtype, p.device, p.requires_grad]
    for name, value in state.items():
        if not isinstance(value, Tensor):
            if not _is_number(value):
                return None
            found.append((name, str(value)))
        elif value.shape == p.shape and p.dim():
            found.append((name, value.dtype))
        elif value.dim():
            return None
        else:
            on_device = value.device.type != "cpu"
            found.append((name, id(value) if on_device else value.item()))
    return tuple(found)


def _is_number(value: Any) -> bool:
    """Or of numbers: the same for all entries."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_number(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_number, value))
    if isinstance(value, Tensor):
        return not value.dim() and not value.requires_grad
    return value is None or isinstance(value, _NUMBERS)


_NUMBERS = (bool, int, float, str, torch.dtype, torch.device, FunctionType, MethodType, type)
