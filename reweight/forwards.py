"""Running the user's model: at other parameters, on copies of its buffers, randomness replayed."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from reweight.batches import describe
from reweight.checks import check_function
from reweight.losses import ExitLosses, logits_kept
from reweight.places import run_with
from reweight.shards import placed

LossFunction: TypeAlias = Callable[[Any, Any], ExitLosses | Tensor]
T = TypeVar("T")


class ExitForward:
    """Inputs and target → the losses of every exit, through the user's model and loss.

    Args:
        model: called with the inputs: a tensor as one argument, a tuple or list as several, a dict
            as named ones.
        inner: the module that the model wraps for distributed training, or the model itself.
        exits: takes the logits out of what the model returns; None if that is the logits.
        loss: (logits, target) → :class:`ExitLosses`, or the losses alone, [B, K].
        compiled: runs the model compiled, inputs → outputs, in place of all else; None for no.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: nn.Module,
        exits: Callable[[Any], Any] | None,
        loss: LossFunction,
        compiled: Callable[[Any], Any] | None = None,
    ) -> None:
        check_function("loss", loss, "(outputs, target) → ExitLosses or losses [B, K]")
        check_function("exits", exits, "outputs of the model → logits")
        self._model, self._inner, self._exits, self._loss = model, inner, exits, loss
        self.compiled = compiled

    def __call__(
        self,
        inputs: Any,
        target: Any,
        *,
        beginning: "Beginning",
        within: AbstractContextManager[Any] | None = None,
        wrapped: bool = True,
    ) -> ExitLosses:
        """The user's own forward: buffers move as they do in any training step.

        A wrapper, which can be left out, may first give all ranks the buffers of rank 0: the
        beginning is told.
        """

        def look(*_: Any) -> None:
            beginning.buffers = {n: b.clone() for n, b in self._inner.named_buffers()}

        model, hook = self._inner, None
        if wrapped and self._model is not self._inner:
            model, hook = self._model, self._inner.register_forward_pre_hook(look, prepend=True)
        try:
            outputs = self._outputs(model, inputs, within)
        finally:
            if hook is not None:
                hook.remove()
        return self._losses(outputs, target, recorded=within is not None)

    def at(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        inputs: Any,
        target: Any,
        then: Callable[[ExitLosses], T],
        *,
        within: AbstractContextManager[Any] | None = None,
        tangents: Mapping[str, Tensor] | None = None,
    ) -> T:
        """The forward at these parameters, the others as they are, on copies of these buffers.

        With tangents of some parameters it is one of dual numbers. What is to be done with the
        losses, gradients above all, is done by ``then``, while the parameters are in place:
        activation checkpointing runs the model again in the backward. The model, not the loss, is
        called ``within`` the context.
        """

        def run() -> T:
            outputs = self._outputs(self._inner, inputs, within)
            return then(self._losses(outputs, target, recorded=within is not None))

        if getattr(parametrize, "_cache_enabled", 0):
            raise ValueError(
                "`parametrize.cached()` must not be around a step: it would keep the parameters of "
                "one pass for the next."
            )
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        with placed(self._inner, parameters, tangents or {}) as rest:
            return run_with(self._inner, {**copies, **rest}, run)

    def _outputs(
        self, model: nn.Module, inputs: Any, within: AbstractContextManager[Any] | None
    ) -> Any:
        try:
            if self.compiled is not None:
                return self.compiled(inputs)
            with within or nullcontext(), torch.compiler.set_stance("force_eager"):
                return call(model, inputs)
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                got = describe(inputs)
                error.add_note(f"`model` got the inputs of a batch (inputs, target): {got}.")
            raise

    def _losses(self, outputs: Any, target: Any, recorded: bool) -> ExitLosses:
        with logits_kept(recorded and self.compiled is None):
            result = self._loss(outputs if self._exits is None else self._exits(outputs), target)
        exit_losses = ExitLosses(result) if isinstance(result, Tensor) else result
        if not isinstance(exit_losses, ExitLosses):
            raise TypeError(
                "`loss` must return ExitLosses or a tensor of losses [samples, exits], got "
                f"{type(result).__name__}."
            )
        if exit_losses.confidence is not None:
            exit_losses = exit_losses._replace(confidence=exit_losses.confidence.detach())
        if exit_losses.losses.dim() != 2 or exit_losses.losses.numel() == 0:
            raise ValueError(
                "`loss` must return losses of shape [samples, exits], one row for each sample, got "
                f"{list(exit_losses.losses.shape)}. Do not average over the samples."
            )
        if exit_losses.valid is None:
            return exit_losses
        counted = torch.where(exit_losses.valid.unsqueeze(1), exit_losses.losses, 0)
        return exit_losses._replace(losses=counted)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """What the model makes of a tensor, a tuple or list of arguments, or a dict of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields"):  # no named tuple
        return model(*inputs)
    return model(inputs)


def require_graph(losses: ExitLosses) -> ExitLosses:
    """The losses, or an error that says why they cannot be trained on."""
    if not losses.losses.requires_grad:
        raise ValueError(
            "`model` must return logits that depend on a trainable parameter, got losses without a "
            "graph. Are all parameters frozen, or gradients switched off?"
        )
    return losses


class RandomState:
    """The state of the generators that the model may draw from, now.

    Those are the global ones of PyTorch, NumPy and Python, and ``torch.Generator`` attributes of
    the model's modules.

    Args:
        model: its devices are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._generators = [
            (value, value.get_state())
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, torch.Generator)
        ]
        self._others = {
            device: getattr(torch, device.type).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Put the generators back to where they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for generator, state in self._generators:
            generator.set_state(state)
        for device, state in self._others.items():
            getattr(torch, device.type).set_rng_state(state, device)


class Beginning:
    """What a forward begins with and may change: buffers and random state, now.

    Args:
        model: looked at now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.random_state = RandomState(model)
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        values = dict(zip(map(id, model.buffers()), self.buffers.values(), strict=True))
        self._places = [
            (module, name, buffer, values[id(buffer)])
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Put both back to where they were.

        Through ``data``, for a graph that holds a buffer would take any change for one that spoils
        it, even the change back.
        """
        self.random_state.restore()
        for module, name, buffer, value in self._places:
            buffer.data.copy_(value)
            module._buffers[name] = buffer


class Gradients:
    """What ``.grad`` of these parameters holds, now.

    Args:
        parameters: looked at now.
        copy: whether gradients that are there already are copied, for a backward that adds to them.
    """

    def __init__(self, parameters: Iterable[Tensor], *, copy: bool = False) -> None:
        self._gradients = [
            (p, p.grad.clone() if copy and p.grad is not None else p.grad) for p in parameters
        ]

    def clear(self) -> None:
        """Take them away."""
        for parameter, _ in self._gradients:
            parameter.grad = None

    def restore(self) -> None:
        """Put them back."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient


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


class DifferenceWatch(TorchFunctionMode):
    """Notices what differences must know of the block: cuts from the graph, and low precision."""

    cuts = False
    precision = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function; looks at which it is, and at what it gives."""
        if func in _CUTS or (func is torch._C._set_grad_enabled and args == (False,)):
            self.cuts = True
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.precision = max(self.precision, torch.finfo(result.dtype).eps)
        return result


_CUTS = (
    Tensor.detach,
    Tensor.detach_,
    torch.detach,
    torch.detach_,
    Tensor.data.__get__,  # type: ignore[attr-defined]
)


def working_precision(parameters: Mapping[str, Tensor]) -> float:
    """The coarsest spacing of the numbers a forward computes with, as far as one can know."""
    dtypes = {parameter.dtype for parameter in parameters.values()}
    devices = {parameter.device.type for parameter in parameters.values()}
    dtypes |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
