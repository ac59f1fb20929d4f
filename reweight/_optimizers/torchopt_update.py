"""The next step of an optimizer of torchopt, which is differentiable as it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt.base import UninitializedState
from torchopt.transform.scale_by_adadelta import ScaleByAdadeltaState

from reweight._ranks.collectives import local


def by_torchopt(
    optimizer: torchopt.Optimizer, index: int, parameters: list[Tensor], gradients: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """One group of an optimizer of torchopt."""
    members: Any = optimizer.param_groups[index]
    given = {id(p): gradient for p, gradient in zip(parameters, gradients, strict=True)}
    state = optimizer.state_groups[index]
    if isinstance(state, UninitializedState):
        state = optimizer.impl.init(members)
    zero = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
    for second_moments in _second_moments(state):
        for p, second_moment in zip(members, second_moments, strict=True):
            if id(p) in given:
                mask = (given[id(p)].detach() == 0) & (second_moment == 0)
                given[id(p)] = cut(given[id(p)], mask)
                zero = zero + local(mask).sum()
    start = tuple(p.detach() for p in members)
    with _first_call_kept(optimizer.impl):
        updates, _ = optimizer.impl.update(
            tuple(given.get(id(p)) for p in members), state, params=start, inplace=False
        )
    moved = {id(p): s + u for p, s, u in zip(members, start, updates, strict=True) if u is not None}
    return [moved.get(id(p), p.detach()) for p in parameters], zero


def _second_moments(state: Any) -> Iterator[Sequence[Tensor]]:
    """What the transformations in this state divide by the root of."""
    for name in ("nu", "sum_of_squares"):
        if hasattr(state, name) and not isinstance(state, ScaleByAdadeltaState):
            yield getattr(state, name)
    if type(state) in (tuple, list):
        for part in state:
            yield from _second_moments(part)


@contextmanager
def _first_call_kept(impl: Any) -> Iterator[None]:
    """Torchopt's momentum remembers outside its state whether it was called: make it forget."""
    cells = [(cell, cell.cell_contents) for cell in _first_call_cells(impl.update)]
    try:
        yield
    finally:
        for cell, value in cells:
            cell.cell_contents = value


def _first_call_cells(function: Any) -> Iterator[CellType]:
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    for name, cell in zip(
        code.co_freevars if code else (), getattr(function, "__closure__", None) or (), strict=True
    ):
        content = cell.cell_contents
        if name == "first_call":
            yield cell
        for inner in content if isinstance(content, list | tuple) else (content,):
            if callable(inner):
                yield from _first_call_cells(inner)


def cut(gradient: Tensor, mask: Tensor) -> Tensor:
    """The same values, with derivative 0 where the mask holds."""
    return torch.where(mask, gradient.detach(), gradient)
