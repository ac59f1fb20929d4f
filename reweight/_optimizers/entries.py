"""Steps that go entry by entry, so that ∂θ̂/∂g is one slope for each.

They are taken block by block, and nothing but values and slopes is kept: small parameters go
through a step together, and of a large one as much as a cache holds, for most of a step is moving
memory.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, optim
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from reweight._optimizers.slopes import OfEach, Slope
from reweight._ranks.collectives import local
from reweight._ranks.shards import shard_like

Program: TypeAlias = Callable[[Sequence[Tensor], OfEach, Tensor], Slope]
"""Of gradients, parameters, moments and numbers makes θ̂, where it is told to, and ∂θ̂/∂g."""
_BLOCK, _LARGE_BLOCK = 1 << 18, 1 << 24  # entries, for a processor's core and for other devices
_SMALL, _SMALL_ELSEWHERE = 1 << 12, 1 << 20  # entries; below, it is calling that costs


class Kind(NamedTuple):
    """Parameters that a step treats alike.

    Attributes:
        group: which they are of.
        names: of the moments that the optimizer holds for each entry.
        columns: gradients, parameters and these moments.
        numbers: that the optimizer holds for each parameter on its device, such as the count of
            its steps, by name.
    """

    group: int
    names: list[str]
    columns: list[list[Tensor]]
    numbers: dict[str, list[Tensor]]


class Slopes(NamedTuple):
    """θ̂ and ∂θ̂/∂g, by the id of the parameter; the entries that are in this process.

    A slope that all entries have in common is a number. Those that are not finite are 0, and
    ``nums_cut`` count them.
    """

    values: dict[int, Tensor]
    slopes: dict[int, Tensor | float]
    nums_cut: list[Tensor]


def taken(programs: Sequence[Program], kinds: Sequence[Kind]) -> Slopes:
    """The step of each kind by its program."""
    found = Slopes({}, {}, [])
    for program, kind in zip(programs, kinds, strict=True):
        for pack in _packs(kind.columns[1]):
            _run(program, _of(kind, pack), found)
    return found


def differentiable(step: Slopes, gradients: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
    """θ̂ as a function of the gradients, by the id of the parameter."""
    held = {key: g for key, g in gradients.items() if g is not None}
    slopes = [shard_like(g, step.slopes[key]) for key, g in held.items()]
    values = [shard_like(g, step.values[key]) for key, g in held.items()]
    moved = _Moved.apply(slopes, *held.values(), *values)  # type: ignore[no-untyped-call]
    return dict(zip(held, moved, strict=True))


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether it is on a device that is waited for where a value is asked for."""
    return tensor.device.type != "cpu"


def plainly_finite(tensor: Tensor) -> bool:
    """Whether one pass shows, as usual, that all entries are; no other device is waited for."""
    return not is_elsewhere(tensor) and math.isfinite(tensor.sum())


def _cut(slope: Tensor) -> Tensor:
    """Let what is not finite be 0, in place; how many entries that is."""
    if plainly_finite(slope):
        return slope.new_zeros((), dtype=torch.int64)
    number = torch.count_nonzero(slope - slope)  # NaN where it is not finite
    slope.nan_to_num_(0, 0, 0)
    return number


class _Moved(torch.autograd.Function):
    """θ̂ as a function of the gradients, entry by entry, when it is known with its slopes."""

    @staticmethod
    def forward(ctx: Any, slopes: Sequence[Tensor | float], *tensors: Tensor) -> Any:
        ctx.slopes = slopes
        ctx.set_materialize_grads(False)
        return tensors[len(slopes) :]  # after as many gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs, rest = list(zip(cotangents, ctx.slopes, strict=True)), [None] * len(cotangents)
        there = [c for c in cotangents if c is not None]
        numbers = all(isinstance(slope, float) for slope in ctx.slopes)
        if len(there) == len(pairs) and (numbers or all(map(_is_like, ctx.slopes, there))):
            return None, *torch._foreach_mul(there, ctx.slopes), *rest
        return None, *(None if c is None else (c * slope).to(c.dtype) for c, slope in pairs), *rest


def _is_like(slope: Tensor | float, cotangent: Tensor) -> bool:
    return isinstance(slope, Tensor) and slope.dtype == cotangent.dtype


def _of(kind: Kind, pack: Sequence[int]) -> Kind:
    """What some of its parameters are given."""
    columns = [[kept[i] for i in pack] for kept in kind.columns]
    numbers = {name: [kept[i] for i in pack] for name, kept in kind.numbers.items()}
    return kind._replace(columns=columns, numbers=numbers)


def _run(program: Program, kind: Kind, found: Slopes) -> None:
    """Of parameters that go through as one, θ̂ and slopes to what is found."""
    members = kind.columns[1]
    parts = [list(map(local, kept)) for kept in kind.columns]
    like = parts[1]
    with torch.no_grad():
        inputs = [joined(each).detach() for each in parts]
        numbers = {name: _stacked(list(map(local, n))) for name, n in kind.numbers.items()}
    value, slope = torch.empty_like(inputs[1]), torch.empty_like(inputs[1])
    blocks: list[Sequence[Tensor]] = [[tensor] for tensor in (*inputs, value, slope)]
    if value.is_contiguous() and like[0].dim():
        size, ones = _size_for(value), [1] * (like[0].dim() - 1)  # some ask for the dimension
        blocks = [[whole.reshape(-1, *ones)] for (whole,) in blocks]
        if value.numel() > size:
            blocks = [whole.split(size) for (whole,) in blocks]
    of_each = OfEach(numbers, like, blocks[1][0].dim())
    for *given, to_value, to_slope in zip(*blocks, strict=True):
        moved = program(given, of_each, to_value)
        if moved.entries is not None:
            torch.mul(moved.entries.expand_as(to_slope), moved.scale, out=to_slope)
            found.nums_cut.append(_cut(to_slope))
    keys, is_number = list(map(id, members)), moved.entries is None
    found.values.update(zip(keys, parted(value, like), strict=True))
    slopes = [moved.scale] * len(keys) if is_number else parted(slope, like)
    found.slopes.update(zip(keys, slopes, strict=True))


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    return numbers[0].detach() if len(numbers) == 1 else torch.stack(list(numbers))


def _size_for(tensor: Tensor) -> int:
    return _LARGE_BLOCK if is_elsewhere(tensor) else _BLOCK * torch.get_num_threads()


def _packs(members: Sequence[Tensor]) -> Iterator[list[int]]:
    """Which go through as one: those that fill a block together, or one alone."""
    size = _size_for(members[0])
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


def kinds_of(
    optimizer: optim.Optimizer,
    gradients: Mapping[int, Tensor | None],
    *,
    is_known: bool,
    apart: bool = False,
) -> list[Kind] | None:
    """Those that have a gradient.

    None where the optimizer holds more than entries and numbers, unless it is known to use no more.
    Parameters that have numbers on the device are kinds of their own, if they are to be apart, or
    if the class is not PyTorch's, for it may give one the count of another.
    """
    if not is_known and not only_numbers(optimizer):
        return None
    apart = apart or not type(optimizer).__module__.startswith("torch.optim.")
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        if not is_known and group.get("fused"):
            return None
        for p in group["params"]:
            if gradients.get(id(p)) is None:
                continue
            like = _like(p, optimizer.state.get(p, {}), is_known, apart)
            if like is None or (vars(p) and not is_known):
                return None
            alike[(number, *like)].append(p)
    kinds = []
    for (number, *_), members in alike.items():
        states = [optimizer.state.get(p, {}) for p in members]
        held = {name: v for name, v in states[0].items() if isinstance(v, Tensor)}
        shape = members[0].shape
        names = [n for n, v in held.items() if v.shape == shape and (shape or n != "step")]
        given = [g for p in members if (g := gradients[id(p)]) is not None]
        moments = [[state[name] for state in states] for name in names]
        others = [] if apart else [n for n, v in held.items() if n not in names and is_elsewhere(v)]
        numbers = {name: [state[name] for state in states] for name in others}
        kinds.append(Kind(number, names, [given, members, *moments], numbers))
    return kinds


def only_numbers(optimizer: optim.Optimizer) -> bool:
    """Whether beside its state it holds no more, nor do its groups."""
    held = itertools.chain(vars(optimizer).items(), *(g.items() for g in optimizer.param_groups))
    return all(is_number(value) for name, value in held if name not in _PARTS)


_PARTS = ("param_groups", "state", "params", "param_names", "step")


def _like(
    p: Tensor, state: Mapping[str, Any], is_known: bool, apart: bool
) -> tuple[Any, ...] | None:
    """What those that go as one have alike; None if the state is not of entries and numbers."""
    if p.is_complex():
        return None
    # A step that is not known may ask for the dimension.
    found: list[Any] = [is_known or p.dim() or id(p), p.dtype, p.device, p.requires_grad]
    shape = p.shape
    for name, value in state.items():
        if not isinstance(value, Tensor):
            if not is_number(value):
                return None
            found.append((name, str(value)))
        elif value.shape == shape and (shape or name != "step"):  # a count is not of entries
            found.append((name, value.dtype))
        elif value.dim():
            return None
        elif not is_elsewhere(value):
            found.append((name, value.item()))
        else:
            found.append((name, value.dtype, value.device, apart and id(value)))
    return tuple(found)


def is_number(value: Any) -> bool:
    """Or of numbers: the same for all entries."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_number(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_number, value))
    if isinstance(value, Tensor):
        return not value.dim() and not value.requires_grad
    return value is None or isinstance(value, _NUMBERS)


_NUMBERS = (bool, int, float, str, torch.dtype, torch.device, FunctionType, MethodType, type)


def together(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Which go through operations as one: small ones that are alike."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        most = _SMALL_ELSEWHERE if is_elsewhere(tensor) else _SMALL
        is_small = tensor.numel() <= most and tensor.is_contiguous()
        found[(tensor.device, tensor.dtype) if is_small else i].append(i)
    return list(found.values())


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All their entries; one tensor stays as it is."""
    dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors]
    return dense[0] if len(dense) == 1 else _flatten_dense_tensors(dense)


def parted(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The other way."""
    if len(like) == 1:
        return [whole]
    parts = zip(_unflatten_dense_tensors(whole, like), like, strict=True)
    return [part if part.numel() else part.view(t.shape) for part, t in parts]  # PyTorch 2.6: [0]
