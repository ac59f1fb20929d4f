"""The step that a class takes itself, on copies, leaving no trace."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, optim
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from reweight._optimizers.operations import LOW
from reweight._optimizers.twin import Alias, twin

By = dict[int, Tensor]
"""By the id of the parameter."""


def own_step(
    optimizer: optim.Optimizer,
    gradients: Mapping[int, Tensor | None],
    alias: Alias,
    wide: torch.dtype | None = None,
) -> By:
    """θ̂ as the class's own step makes it, on copies of all that it holds."""
    new = twin(optimizer, gradients, alias)
    with step_alone(new.parameters.values(), wide), Widened(wide) if wide else nullcontext():
        new.step()
    return {key: p.detach() for key, p in new.parameters.items()}


@contextmanager
def step_alone(
    parameters: Iterable[Tensor], default_dtype: torch.dtype | None = None
) -> Iterator[None]:
    """A step that draws what the next one will, runs uncompiled, and leaves no trace of it."""
    devices = {p.device for p in parameters if p.device.type != "cpu"}
    with ExitStack() as stack:
        kinds = {device.type for device in devices} or {"cuda"}
        for kind in kinds:
            numbers = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(numbers, device_type=kind))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.callback(random.setstate, random.getstate())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(default_dtype or torch.get_default_dtype())
        if (numpy_random := sys.modules.get("numpy.random")) is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        yield


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In memory of its own, and in that precision if it has less."""
    wanted = dtype if dtype and (tensor.dtype in LOW or tensor.dtype is torch.float32) else None
    return tensor.detach().to(wanted or tensor.dtype, copy=True)


class Widened(TorchDispatchMode):
    """What is asked for in a lower precision comes in this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in (*LOW, torch.float32):
            kwargs = {**kwargs, "dtype": self._dtype}
        return func(*args, **kwargs)
