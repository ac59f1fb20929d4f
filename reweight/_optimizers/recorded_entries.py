"""A recorded step that goes entry by entry: what it does to two of them is done again to all."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn, optim

from reweight._optimizers import entries
from reweight._optimizers.entries import Kind, Slopes, kinds_of, taken
from reweight._optimizers.operations import Call
from reweight._optimizers.recorded_step import How, recorded_step
from reweight._optimizers.slopes import Program
from reweight._optimizers.twin import part
from reweight._ranks.collectives import local


def entry_by_entry(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], how: How
) -> Slopes | None:
    """The next step and its slopes; None if it is not one that goes entry by entry.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none.
        how: what the class bears.
    """
    for apart in (False, True):
        kinds = kinds_of(optimizer, gradients, is_known=False, apart=apart)
        programs = kinds and _programs(optimizer, kinds, how)
        if kinds and programs:
            return taken(programs, kinds)
        if not (kinds and any(kind.numbers for kind in kinds)):
            break
    return None


def _programs(
    optimizer: optim.Optimizer, kinds: Sequence[Kind], how: How
) -> list[entries.Program] | None:
    """What is done to entries of each kind."""
    some = part(optimizer, ())
    inputs: list[list[Tensor]] = []
    numbers: list[dict[str, Tensor]] = []
    leaves: dict[int, Tensor] = {}
    for number, names, columns, of_each in kinds:
        gradient, p, *moments = (_two_entries(kept[0]) for kept in columns)
        first = columns[1][0]
        new = nn.Parameter(p, first.requires_grad)
        numbers.append({name: _two_entries(kept[0]) for name, kept in of_each.items()})
        some.param_groups[number]["params"].append(new)
        some.state[new].update(optimizer.state.get(first, {}))
        some.state[new].update(zip(names, moments, strict=True))
        some.state[new].update(numbers[-1])
        leaves[id(new)] = gradient.requires_grad_()
        inputs.append([gradient, new, *moments])
    calls: list[Call] = []
    try:
        moved, recorder = recorded_step(some, leaves, how, calls)
        if not recorder.is_entrywise or recorder.is_widened or recorder.has_constants:
            return None
        rows = zip(leaves, inputs, numbers, strict=True)
        return [Program(calls, few, moved[k], of_each).into for k, few, of_each in rows]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for what entries alone have not
        return None


def _two_entries(tensor: Tensor) -> Tensor:
    """In memory of their own."""
    mine = local(tensor.detach())
    if not mine.dim():
        return mine.clone()
    return mine.reshape(-1)[:2].clone().view(-1, *[1] * (mine.dim() - 1))
