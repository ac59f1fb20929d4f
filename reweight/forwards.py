"""Running the user's model: at other parameters, on copies of its buffers, randomness replayed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from reweight.losses import ExitLosses

LossFunction: TypeAlias = Callable[[Any, Any], ExitLosses | Tensor]


class ExitForward:
    """Inputs and target → the losses of every exit, through the user's model and loss.

    Args:
        model: called with the inputs: a tensor as one argument, a tuple or list as several, a dict
            as named ones.
        exits: takes the logits out of what the model returns; None if that is the logits.
        loss: (logits, target) → :class:`ExitLosses`, or the losses alone, [B, K].
    """

    def __init__(
        self, model: nn.Module, exits: Callable[[Any], Any] | None, loss: LossFunction
    ) -> None:
        self._model, self._exits, self._loss = model, exits, loss

    def __call__(self, inputs: Any, target: Any) -> ExitLosses:
        """The user's own forward: buffers move as they do in any training step."""
        args, kwargs = _arguments(inputs)
        return self._losses(self._model(*args, **kwargs), target)

    def at(self, parameters: Mapping[str, Tensor], inputs: Any, target: Any) -> ExitLosses:
        """The forward at these parameters, the others as they are, on copies of the buffers."""
        args, kwargs = _arguments(inputs)
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        outputs = functional_call(self._model, {**buffers, **parameters}, args, kwargs)
        return self._losses(outputs, target)

    def _losses(self, outputs: Any, target: Any) -> ExitLosses:
        result = self._loss(outputs if self._exits is None else self._exits(outputs), target)
        exit_losses = ExitLosses(result) if isinstance(result, Tensor) else result
        if not isinstance(exit_losses, ExitLosses):
            raise TypeError(
                "`loss` must return ExitLosses or a tensor of losses [samples, exits], got "
                f"{type(result).__name__}."
            )
        if exit_losses.losses.dim() != 2 or exit_losses.losses.numel() == 0:
            raise ValueError(
                "`loss` must return losses of shape [samples, exits], one row for each sample, got "
                f"{list(exit_losses.losses.shape)}. Do not average over the samples."
            )
        return exit_losses


class RandomState:
    """The state of the random number generators that the model draws from, now.

    Args:
        model: its devices are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self._cpu = torch.get_rng_state()
        self._others = {
            device: getattr(torch, device.type).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            getattr(torch, device.type).set_rng_state(state, device)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain operations: fused kernels have no forward mode and no double backward."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[RandomState]:
    """Put buffers and random state back if the block raises; yields the random state before it."""
    random_state = RandomState(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield random_state
    except BaseException:
        random_state.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        raise


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}
