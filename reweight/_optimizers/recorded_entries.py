"""A recorded step that goes entry by entry: what it does to two of them is done again to all."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn, optim

from reweight._optimizers.entries import Slopes, kinds_of, taken
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
    kinds = kinds_of(optimizer, gradients, is_known=False)
    if kinds is None:
        return None
    some = part(optimizer, ())
    inputs: list[list[Tensor]] = []
    leaves: dict[int, Tensor] = {}
    for number, names, columns in kinds:
        gradient, p, *moments = (_two_entries(kept[0]) for kept in columns)
        first = columns[1][0]
        new = nn.Parameter(p, first.requires_grad)
        some.param_groups[number]["params"].append(new)
        some.state[new].update(optimizer.state.get(first, {}))
        some.state[new].update(zip(names, moments, strict=True))
        leaves[id(new)] = gradient.requires_grad_()
        inputs.append([gradient, new, *moments])
    calls: list[Call] = []
    try:
        moved, recorder = recorded_step(some, leaves, how, calls)
        if not recorder.is_entrywise or recorder.is_widened or recorder.has_constants:
            return None
        programs = [
            Program(calls, few, moved[k]).into for k, few in zip(leaves, inputs, strict=True)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for what entries alone have not
        return None
    return taken(programs, kinds)


def _two_entries(tensor: Tensor) -> Tensor:
    """In memory of their own."""
    mine = local(tensor.detach())
    if not mine.dim():
        return mine.clone()
    return mine.reshape(-1)[:2].clone().view(-1, *[1] * (mine.dim() - 1))
