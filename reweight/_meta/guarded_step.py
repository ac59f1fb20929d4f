"""A step of an optimizer that is taken or not, and can be taken back."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from reweight._optimizers.entries import joined, parted
from reweight._passes.snapshots import clones, copy_all

Pair: TypeAlias = tuple[Tensor, Tensor | None]


class Snapshot:
    """The parameters of an optimizer, its state and what its groups hold, now."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [dict(group) for group in optimizer.param_groups]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [optimizer.state.get(p) for p in self.parameters]
        tensors = dict[Any, Tensor](enumerate(self.parameters))
        for i, state in enumerate(states):
            for name, value in (state or {}).items():
                if isinstance(value, Tensor):
                    tensors[i, name] = value
        copies = clones({place: tensor.detach() for place, tensor in tensors.items()})
        self.values = [copies[i] for i in range(len(states))]
        self.states = [
            None if state is None else {n: copies.get((i, n), value) for n, value in state.items()}
            for i, state in enumerate(states)
        ]

    def clear_gradients(self) -> None:
        """Take ``.grad`` away, as ``zero_grad`` does at a higher price."""
        for parameter in self.parameters:
            parameter.grad = None

    def restore(self) -> None:
        """Put all of it back."""
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(before)
        for parameter, value, state in zip(self.parameters, self.values, self.states, strict=True):
            parameter.data.copy_(value)
            self._optimizer.state.pop(parameter, None)
            if state is not None:
                self._optimizer.state[parameter] = state


def step_where(optimizer: Optimizer, ok: Tensor, before: Snapshot) -> Tensor:
    """``optimizer.step()`` if ``ok`` holds, else nothing, without waiting for the device to tell.

    Nothing either if the step leads to a parameter that is not finite. Takes the gradients away
    afterwards. What lives on another device than ``ok``, or is no tensor, moves on in either case:
    a count of steps, in the state or in a group; the gradients are 0 then.

    Returns:
        Whether the step was taken, bool, scalar.
    """
    step = _step_if if ok.device.type == "cpu" else _step_and_undo
    taken = step(optimizer, ok, before)
    before.clear_gradients()
    return taken


def _step_if(optimizer: Optimizer, ok: Tensor, before: Snapshot) -> Tensor:
    """On the CPU, which is not waited for and need not do what is then undone."""
    if ok:
        optimizer.step()
        ok = are_finite(before.parameters).all()
        if not ok:
            before.restore()
    return ok


@torch.no_grad()
def _step_and_undo(optimizer: Optimizer, ok: Tensor, before: Snapshot) -> Tensor:
    """On a device that is not asked."""
    _keep_where(ok, [(p.grad, None) for p in before.parameters if p.grad is not None])
    optimizer.step()
    ok = ok & are_finite(before.parameters).all()
    pairs = list[Pair](zip(before.parameters, before.values, strict=True))
    for parameter, state in zip(before.parameters, before.states, strict=True):
        for name, old in (state or {}).items():
            if isinstance(old, Tensor) and old.device == ok.device:
                pairs.append((optimizer.state[parameter][name], old))
    _keep_where(ok, pairs)
    return ok


def _keep_where(ok: Tensor, pairs: Iterable[Pair]) -> None:
    """Let the first of each be the second, or 0, unless it is so; all of a dtype as one."""
    alike = defaultdict[torch.dtype, list[Pair]](list)
    for tensor, other in pairs:
        alike[tensor.dtype].append((tensor.detach(), other))
    for some in alike.values():
        kept, others = [tensor for tensor, _ in some], [t for _, t in some if t is not None]
        chosen = torch.where(ok, joined(kept), joined(others) if others else 0)
        copy_all(kept, parted(chosen, kept))


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every entry of each is, bool [n], on their device."""
    largest = torch.stack(
        torch._foreach_norm([t.detach() for t in tensors if t.numel()], torch.inf)
    )
    return largest - largest == 0  # else it is not a number
