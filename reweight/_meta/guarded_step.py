"""A step of an optimizer that is taken or not, and can be taken back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from reweight._passes.snapshots import clones


class Snapshot:
    """The parameters of an optimizer and its state, now."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
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
        """Put both back."""
        for parameter, value, state in zip(self.parameters, self.values, self.states, strict=True):
            parameter.data.copy_(value)
            self._optimizer.state.pop(parameter, None)
            if state is not None:
                self._optimizer.state[parameter] = state


def step_where(optimizer: Optimizer, ok: Tensor, before: Snapshot) -> Tensor:
    """``optimizer.step()`` if ``ok`` holds, else nothing, without waiting for the device to tell.

    Nothing either if the step leads to a parameter that is not finite. Takes the gradients away
    afterwards. State that lives on another device than ``ok`` (the step count of Adam, on the CPU)
    moves on in either case.

    Returns:
        Whether the step was taken, bool, scalar.
    """
    if ok.device.type == "cpu":  # which is not waited for, and need not do what is then undone
        if ok:
            optimizer.step()
            ok = are_finite(before.parameters).all()
            if not ok:
                before.restore()
        before.clear_gradients()
        return ok
    for parameter in before.parameters:
        if parameter.grad is not None:
            parameter.grad = torch.where(ok, parameter.grad, 0)
    optimizer.step()
    ok = ok & are_finite(before.parameters).all()
    for parameter, value, state in zip(
        before.parameters, before.values, before.states, strict=True
    ):
        parameter.data.copy_(torch.where(ok, parameter.data, value))
        for name, old in (state or {}).items():
            new = optimizer.state[parameter][name]
            if isinstance(old, Tensor) and old.device == ok.device:
                new.copy_(torch.where(ok, new, old))
    before.clear_gradients()
    return ok


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every entry of each is, bool [n], on their device."""
    largest = torch.stack(
        torch._foreach_norm([t.detach() for t in tensors if t.numel()], torch.inf)
    )
    return largest - largest == 0  # else it is not a number
