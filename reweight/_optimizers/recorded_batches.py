"""A recorded step of many small parameters: those that are alike go through it as one.

Recording costs Python for each operation, and most of these are the same for one parameter after
another. So a few are recorded, each for a batch of others.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, optim

from reweight._optimizers.batch_recorder import BatchRecorder
from reweight._optimizers.entries import is_number, only_numbers
from reweight._optimizers.own_step import By, copied, own_step
from reweight._optimizers.recorded_step import How, precision, run
from reweight._optimizers.scalars import Refused, valued
from reweight._optimizers.twin import part, twin
from reweight._ranks.collectives import is_sharded

_FEW = 1 << 20  # entries of all; of more, calling operations is not what takes time


def in_batches(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], how: How
) -> By | None:
    """θ̂ by the id of the parameter, with values bitwise those of the step.

    None where little would be gained, or where the step is not the same for all of a batch.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none.
        how: what the class bears.
    """
    kinds = _kinds(optimizer, gradients)
    # One of each kind goes by itself: what becomes of several together would not show in one batch.
    batches = [batch for kind in kinds for batch in (kind[:-1], kind[-1:]) if batch]
    num_entries = sum(p.numel() for kind in kinds for p in kind)
    is_gain = 2 * len(batches) <= sum(map(len, batches)) and num_entries <= _FEW
    if not (batches and is_gain and how.keeps_numbers):
        return None
    values = own_step(optimizer, gradients, copied)
    found: By = {}
    try:
        while batches:
            _take(optimizer, gradients, batches, how, values, found)
            left = ([p for p in kind if id(p) not in found] for kind in kinds)
            batches = [kind for kind in left if kind]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for what a batch has not
        return None
    return found


def _kinds(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None]
) -> list[list[Tensor]]:
    """Those that are alike; none where the optimizer holds what may be of each."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not only_numbers(optimizer) or any(id(key) not in held for key in optimizer.state):
        return []
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if (gradient := gradients.get(id(p))) is not None:
                if is_sharded(p) or p.is_complex() or not p.dim():
                    return []
                like = _like(p, gradient, optimizer.state.get(p, {}))
                alike[(number, *like)].append(p)
    return list(alike.values())


def _like(p: Tensor, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What those of one batch have alike."""
    moves = p.requires_grad, gradient.requires_grad
    found: list[Any] = [id(p) if vars(p) else 0, moves, p.shape, p.dtype, p.device]
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            found.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, Tensor):
            found.append((name, value.item() if value.device.type == "cpu" else id(value)))
        else:
            found.append((name, str(value) if is_number(value) else id(value)))
    return tuple(found)


def _take(
    optimizer: optim.Optimizer,
    gradients: Mapping[int, Tensor | None],
    batches: list[list[Tensor]],
    how: How,
    values: By,
    found: By,
) -> None:
    """Find the step of those whose conditions are as for most of their batch."""
    firsts = {id(members[0]): gradients[id(members[0])] for members in batches}
    new = twin(part(optimizer, firsts), firsts, _alias)
    recorder, starts = BatchRecorder(precision(optimizer, how)), []
    for number, members in enumerate(batches):
        p: Tensor = new.parameters[id(members[0])]
        given = [g for one in members if (g := gradients[id(one)]) is not None]
        assert p.grad is not None
        recorder.hold(p, [one.detach() for one in members], number)
        starts.append(recorder.hold(p.grad, given, number))
        for name, value in new.optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim():
                recorder.hold(value, [optimizer.state[one][name] for one in members], number)
    run(new, recorder)
    for members, start, follows in zip(batches, starts, recorder.follows, strict=True):
        moved = recorder.read(new.parameters[id(members[0])])
        own, before = (
            torch.stack([kept[id(p)] for p in members]).flatten(1)
            for kept in (values, {id(p): p.detach() for p in members})
        )
        off = (moved.detach().flatten(1) - own).norm(dim=1)
        if not (off <= _allowed(own, before, recorder))[follows].all():
            raise Refused("its step does other things to one of them")
        if start.requires_grad and not all(follows):
            start.register_hook(partial(_kept, torch.tensor(follows, device=start.device)))
        exact = valued(moved, own.view_as(moved))
        pairs = zip(members, exact, follows, strict=True)
        found.update((id(p), one) for p, one, does in pairs if does)


def _allowed(own: Tensor, before: Tensor, recorder: BatchRecorder) -> Tensor:
    """How far the step of each may be off by rounding: iterations in bfloat16 are by a tenth."""
    eps, rounding = torch.finfo(own.dtype).eps, 0.1 if recorder.is_widened else 1e-3
    allowed: Tensor = 4 * eps * own.norm(dim=1) + rounding * (own - before).norm(dim=1)
    return allowed


def _kept(follows: Tensor, derivative: Tensor) -> Tensor:
    """Of others not even 0 · ∞."""
    return torch.where(follows.view(-1, *[1] * (derivative.dim() - 1)), derivative, 0)


def _alias(tensor: Tensor) -> Tensor:
    """Memory for what stands for others; counts are the same for all."""
    if not tensor.dim():
        return tensor.data
    return torch.empty_like(tensor.data, memory_format=torch.contiguous_format)
