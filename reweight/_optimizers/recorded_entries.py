"""A recorded step that goes entry by entry, block by block.

Then ∂θ̂/∂g is one slope for each entry, and nothing else is kept for the way back. What the step did
to one block is done again to the others: small parameters go through it together, and of a large
one as much as a cache holds, for most of a step is moving memory.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    members = [p for kind in alike.values() for p in kind]
    num_cut = torch.zeros((), dtype=torch.int64, device=members[0].device)
    found = Slopes({}, {}, num_cut)
    inputs: list[tuple[Tensor, ...]] = []
    leaves: dict[int, Tensor] = {}
    for (number, *_), members in alike.items():
        columns = _columns(optimizer, gradients, members)
        gradient, p, *moments = (_few(kept[0]) for kept in columns.values())
        new = nn.Parameter(p, members[0].requires_grad)
        some.param_groups[number]["params"].append(new)
        state = optimizer.state.get(members[0], {})
        some.state[new].update({**state, **dict(zip(list(columns)[2:], moments, strict=True))})
        leaves[id(new)] = gradient.requires_grad_()
        inputs.append((gradient, new, *moments))
    calls: list[Call] = []
    try:
        moved, recorder = recorded_step(some, leaves, how, calls)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for what entries alone have not
        return None
    if not recorder.is_entrywise or recorder.is_widened or recorder.has_constants:
        return None
    for key, few, members in zip(leaves, inputs, alike.values(), strict=True):
        try:
            program = Program(calls, few, moved[key])
        except ValueError:
            return None
        for block in _blocks(_columns(optimizer, gradients, members), members, found):
            num_cut += _run(program, *block).to(num_cut.device)
    return found


def _few(tensor: Tensor) -> Tensor:
    """Some entries of it, in memory of their own."""
    mine = local(tensor.detach())
    if not mine.dim():
        return mine.clone()
    return mine.reshape(-1)[:2].clone().view(-1, *[1] * (mine.dim() - 1))


def _columns(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], members: list[Tensor]
) -> dict[str, list[Tensor]]:
    """What there is for each entry of some parameters: gradient and value, and of the state."""
    state = [optimizer.state.get(p, {}) for p in members]
    moments = [n for n, v in state[0].items() if isinstance(v, Tensor) and v.shape == members[0].shape]
    given = [g for p in members if (g := gradients[id(p)]) is not None]
    return {"": given, " ": members, **{name: [held[name] for held in state] for name in moments}}


def _run(program: Program, *block: Tensor) -> Tensor:
    """A block, whose results go to the last two tensors; how many slopes were cut."""
    *inputs, value, slope = block
    new, (scale, entries) = program(inputs)
    value.copy_(new)
    if entries is None:
        return slope.fill_(scale).new_zeros((), dtype=torch.int64)
    return cut(torch.mul(entries.expand_as(slope), scale, out=slope))


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
    for i in sorted(range(len(members)), key=lambda i: sizes[i]):
        if pack and sum(sizes[j] for j in pack) + sizes[i] > size:
            yield pack
            pack = []
        pack.append(i)
    yield pack


def _blocks(
    columns: Mapping[str, list[Tensor]], members: Sequence[Tensor], found: Slopes
) -> Iterator[tuple[Tensor, ...]]:
    """Entries in blocks; the last two tensors of each are for the results, in what is found."""
    size = _size_on(members[0].device)
    for pack in _packs(members):
        like = [local(members[i]) for i in pack]
        ones = [1] * (like[0].dim() - 1)  # for steps that ask for the dimension
        wholes = [joined([local(kept[i].detach()) for i in pack]) for kept in columns.values()]
        for kept in (found.values, found.slopes):
            whole = torch.empty_like(wholes[1], dtype=wholes[0].dtype)
            parts = parted(whole, like)
            kept.update((id(members[i]), part) for i, part in zip(pack, parts, strict=True))
            wholes.append(whole)
        if len(pack) > 1 or (wholes[1].numel() > size and wholes[1].is_contiguous()):
            yield from zip(*(t.reshape(-1, *ones).split(size) for t in wholes), strict=True)
        else:
            yield tuple(wholes)


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
