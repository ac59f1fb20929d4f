"""The next step of any optimizer of torch.optim's form, by its own ``step``."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, optim

from reweight._optimizers.operations import LOW, Call
from reweight._optimizers.own_step import By, copied, own_step, step_alone
from reweight._optimizers.recorder import Recorder
from reweight._optimizers.scalars import valued
from reweight._optimizers.twin import Twin, twin


class RecordedStep(NamedTuple):
    """A step of an optimizer.

    Attributes:
        parameters: θ̂ by the id of the parameter, differentiable in the gradients.
        recorder: which says what has no derivative.
    """

    parameters: By
    recorder: Recorder


class How(NamedTuple):
    """How the step of a class can be recorded.

    Attributes:
        widened: in float32 where it asks for less; code of its own may not bear that.
        keeps_numbers: see :class:`Recorder`; code of its own may take no number but Python's.
        by_entries: whether many parameters can go through it as one.
        in_batches: whether those that are alike can, each with all its entries.
    """

    widened: bool = True
    keeps_numbers: bool = True
    by_entries: bool = False
    in_batches: bool = False


USUAL = How()


def recorded_step(
    optimizer: optim.Optimizer,
    gradients: Mapping[int, Tensor | None],
    how: How = USUAL,
    calls: list[Call] | None = None,
) -> RecordedStep:
    """What the parameters would be after the next step, which is not taken.

    Values are bitwise those of the step. Where it computes in a lower precision than that of its
    parameters, or by a fused kernel, which has no derivative, they are those of the step on copies,
    and the derivative is that of the same step in float32, unfused.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none. One that is not named has its own.
        how: what the class bears.
        calls: gets the operations of a step that goes entry by entry.
    """
    first = record(optimizer, gradients, precision(optimizer, how), how.keeps_numbers, calls=calls)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if not (fused or first.recorder.is_widened):
        return first
    values = own_step(optimizer, gradients, copied)
    return first._replace(
        parameters={key: valued(p, values[key]) for key, p in first.parameters.items()}
    )


def record(
    optimizer: optim.Optimizer,
    gradients: Mapping[int, Tensor | None],
    wide: torch.dtype | None,
    keeps_numbers: bool,
    *,
    default_dtype: torch.dtype | None = None,
    calls: list[Call] | None = None,
) -> RecordedStep:
    """A step that computes in that precision where it asks for a lower one."""
    new = twin(optimizer, gradients, lambda tensor: tensor.data)
    recorder = Recorder(wide, keeps_numbers)
    recorder.calls = calls
    for key, gradient in gradients.items():
        held = new.parameters[key].grad
        if held is not None and gradient is not None:
            recorder.write(held, gradient)
    run(new, recorder, default_dtype)
    moved = {key for key, gradient in gradients.items() if gradient is not None}
    return RecordedStep({key: recorder.read(new.parameters[key]) for key in moved}, recorder)


def run(new: Twin, recorder: Recorder, default_dtype: torch.dtype | None = None) -> None:
    """Take the step of a twin, recorded."""
    for group in new.optimizer.param_groups:
        if group.get("fused"):
            group["fused"] = False
    with step_alone(new.parameters.values(), default_dtype), recorder.numbers(), recorder:
        new.step()


def precision(optimizer: optim.Optimizer, how: How) -> torch.dtype | None:
    """What a step is recorded in where it asks for less; None for as it asks."""
    is_low = any(p.dtype in LOW for group in optimizer.param_groups for p in group["params"])
    return torch.float32 if how.widened and not is_low else None
