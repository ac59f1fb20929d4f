"""The next step of any optimizer of torch.optim's form, by its own ``step``."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, optim

from reweight._optimizers.recorder import LOW, Recorder, valued
from reweight._optimizers.twin import twin

By = dict[int, Tensor]
"""By the id of the parameter."""


class RecordedStep(NamedTuple):
    """A step of an optimizer.

    Attributes:
        parameters: θ̂ by the id of the parameter, differentiable in the gradients.
        recorder: which says what has no derivative.
    """

    parameters: By
    recorder: Recorder


def recorded_step(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], keeps_numbers: bool = True
) -> RecordedStep:
    """What the parameters would be after the next step, which is not taken.

    Values are bitwise those of the step. Where it computes in a lower precision than that of its
    parameters, or by a fused kernel, which has no derivative, it runs twice: the derivative is that
    of the same step in float32, unfused.

    Args:
        optimizer: nothing of it changes.
        gradients: by the id of the parameter; None for none. One that is not named has its own.
        keeps_numbers: see :class:`Recorder`.
    """
    is_wide = all(p.dtype not in LOW for group in optimizer.param_groups for p in group["params"])
    first = record(optimizer, gradients, torch.float32 if is_wide else None, keeps_numbers)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if not (fused or first.recorder.is_widened):
        return first
    constants = {key: None if g is None else g.detach() for key, g in gradients.items()}
    values = record(optimizer, constants, None, keeps_numbers, unfused=False).parameters
    return first._replace(
        parameters={key: valued(p, values[key]) for key, p in first.parameters.items()}
    )


def record(
    optimizer: optim.Optimizer,
    gradients: Mapping[int, Tensor | None],
    wide: torch.dtype | None,
    keeps_numbers: bool,
    unfused: bool = True,
) -> RecordedStep:
    """A step that computes in that precision where it asks for a lower one."""
    new = twin(optimizer, gradients, lambda tensor: tensor.data)
    if unfused:
        for group in new.optimizer.param_groups:
            group.update({"fused": False} if group.get("fused") else {})
    recorder = Recorder(wide, keeps_numbers)
    for key, gradient in gradients.items():
        held = new.parameters[key].grad
        if held is not None and gradient is not None:
            recorder.write(held, gradient)
    with step_alone(new.parameters.values()), recorder.numbers(), recorder:
        new.step()
    return RecordedStep(
        {
            key: recorder.read(p)
            for key, p in new.parameters.items()
            if gradients.get(key) is not None
        },
        recorder,
    )


@contextmanager
def step_alone(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A step that draws what the next one will, and runs uncompiled."""
    devices = {p.device for p in parameters if p.device.type != "cpu"}
    with ExitStack() as stack:
        kinds = {device.type for device in devices} or {"cuda"}
        for kind in kinds:
            numbers = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(numbers, device_type=kind))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield
