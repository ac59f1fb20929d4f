"""A recorded step that goes entry by entry, block by block.

Then ∂θ̂/∂g is one slope for each entry, and nothing else is kept for the way back. What the step did
to one block is done again to the others: small parameters go through it together, and of a large
one as much as a cache holds, for most of a step is moving memory.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim

from reweight._optimizers.entries import cut, joined, parted
from reweight._optimizers.operations import Call
from reweight._optimizers.recorded_step import How, recorded_step
from reweight._optimizers.slopes import Program
from reweight._ranks.collectives import local

_BLOCK, _LARGE_BLOCK = 1 << 18, 1 << 24  # entries, for a processor's core and for other devices


class Slopes(NamedTuple):
    """θ̂ and ∂θ̂/∂g, by the id of the parameter; the entries that are in this process.

    Slopes that are not finite are 0, and ``num_cut`` counts them.
    """

    values: dict[int, Tensor]
    slopes: dict[int, Tensor]
    num_cut: Tensor


def entry_by_entry(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], how: How
) -> Slopes | None:
    """The next step and its slopes; None if it is not one that goes entry by entry.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none.
        how: what the class bears.
    """
    alike = _alike(optimizer, gradients)
    if alike is None:
        return None
    some = object.__new__(type(optimizer))
    some.__dict__.update(vars(optimizer))
    some.state = defaultdict(dict)
    some.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    for group in some.param_groups:
        group.pop("param_names", None)
    kinds: list[tuple[list[list[Tensor]], list[Tensor]]] = []
    leaves: dict[int, Tensor] = {}
    for (number, *_), members in alike.items():
        state = optimizer.state.get(members[0], {})
        names = [
            n for n, v in state.items() if isinstance(v, Tensor) and v.shape == members[0].shape
        ]
        given = [g for p in members if (g := gradients[id(p)]) is not None]
        columns = [given, members, *([optimizer.state[p][n] for p in members] for n in names)]
        gradient, p, *moments = (_two_entries(kept[0]) for kept in columns)
        new = nn.Parameter(p, members[0].requires_grad)
        some.param_groups[number]["params"].append(new)
        some.state[new].update({**state, **dict(zip(names, moments, strict=True))})
        leaves[id(new)] = gradient.requires_grad_()
        kinds.append((columns, [gradient, new, *moments]))
    calls: list[Call] = []
    try:
        moved, recorder = recorded_step(some, leaves, how, calls)
        programs = [
            Program(calls, few, moved[key]) for key, (_, few) in zip(leaves, kinds, strict=True)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for what entries alone have not
        return None
    if not recorder.is_entrywise or recorder.is_widened or recorder.has_constants:
        return None
    found = Slopes({}, {}, torch.zeros((), dtype=torch.int64, device=given[0].device))
    for program, (columns, _) in zip(programs, kinds, strict=True):
        for pack in _packs(columns[1]):
            _run(program, [[kept[i] for i in pack] for kept in columns], found)
    return found


def _two_entries(tensor: Tensor) -> Tensor:
    """In memory of their own."""
    mine = local(tensor.detach())
    if not mine.dim():
        return mine.clone()
    return mine.reshape(-1)[:2].clone().view(-1, *[1] * (mine.dim() - 1))


def _run(program: Program, columns: Sequence[Sequence[Tensor]], found: Slopes) -> None:
    """Of parameters that go through as one, θ̂ and slopes to what is found."""
    members = columns[1]
    like = list(map(local, members))
    inputs = [joined([local(tensor.detach()) for tensor in kept]) for kept in columns]
    value, slope = torch.empty_like(inputs[1]), torch.empty_like(inputs[1])
    blocks: list[Sequence[Tensor]] = [[tensor] for tensor in (*inputs, value, slope)]
    if value.is_contiguous() and like[0].dim():
        size, ones = _size_on(value.device), [1] * (like[0].dim() - 1)  # some ask for the dimension
        blocks = [whole.reshape(-1, *ones).split(size) for (whole,) in blocks]
    for *given, to_value, to_slope in zip(*blocks, strict=True):
        new, moved = program(given)
        to_value.copy_(new)
        if moved.entries is not None:
            torch.mul(moved.entries.expand_as(to_slope), moved.scale, out=to_slope)
            found.num_cut.add_(cut(to_slope).to(found.num_cut.device))
    if moved.entries is None:
        slope = slope.new_full((), moved.scale).expand_as(slope)
    for kept, whole in ((found.values, value), (found.slopes, slope)):
        kept.update(zip(map(id, members), parted(whole, like), strict=True))


def _alike(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None]
) -> dict[Any, list[Tensor]] | None:
    """The parameters of each kind; None where the optimizer holds more than entries and numbers."""
    held = vars(optimizer)
    if not all(_is_number(value) for name, value in held.items() if name not in _PARTS):
        return None
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
            alike[(number, *like)].append(p)
    return alike


def _size_on(device: torch.device) -> int:
    return _BLOCK * torch.get_num_threads() if device.type == "cpu" else _LARGE_BLOCK


def _packs(members: Sequence[Tensor]) -> Iterator[list[int]]:
    """Which go through as one: those that fill a block together, or one alone."""
    size = _size_on(members[0].device)
    sizes = [p.numel() if p.is_contiguous() else size for p in map(local, members)]
    pack: list[int] = []
    filled = 0
    for i in sorted(range(len(members)), key=lambda i: sizes[i]):
        if pack and filled + sizes[i] > size:
            yield pack
            pack, filled = [], 0
        pack.append(i)
        filled += sizes[i]
    yield pack


_PARTS = ("param_groups", "state", "params", "param_names", "step")


def _like(p: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What those that go as one have alike; None if the state is not of entries and numbers."""
    if vars(p) or p.is_complex():
        return None
    found: list[Any] = [p.dim() or id(p), p.dtype, p.device, p.requires_grad]
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
