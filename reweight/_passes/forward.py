"""Running the user's model: at other parameters, on copies of its buffers, randomness replayed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reweight._checks import check_function, noted
from reweight._kernels.function import logits_kept
from reweight._passes.eager import as_written
from reweight._passes.functional import run_with
from reweight._passes.snapshots import Beginning, clones
from reweight._ranks.shards import placed
from reweight.batches import Batch, copied, describe, tensors_of
from reweight.losses import ExitLosses, exit_cross_entropy

LossFunction: TypeAlias = Callable[[Any, Any], ExitLosses | Tensor]
FeatureFunction: TypeAlias = Callable[[Any, Any], Tensor]
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
        features: inputs and target → what weights may see of each sample; None for nothing more.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: nn.Module,
        exits: Callable[[Any], Any] | None,
        loss: LossFunction,
        compiled: Callable[[Any], Any] | None = None,
        features: FeatureFunction | None = None,
    ) -> None:
        check_function("loss", loss, "(outputs, target) → ExitLosses or losses [B, K]")
        check_function("exits", exits, "outputs of the model → logits")
        check_function("features", features, "(inputs, target) → [B, F]")
        self._model, self._inner, self._exits, self._loss = model, inner, exits, loss
        self._features, self._is_plain = features, loss is exit_cross_entropy
        self.compiled = compiled
        # Of a model whose targets stand elsewhere than its outputs, as a causal one's do, or that
        # has a loss of its own beside them, as a mixture of experts has.
        self._align = held_by_a_part(inner, "align_target")
        self._auxiliary = held_by_a_part(inner, "auxiliary_of_forward")
        self._changes_batches: bool | None = None  # in place; not known before the first forward
        self._renormed = [  # whose weights a forward scales in place, to a bounded norm
            module
            for module in inner.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        ]

    def spare(self, batch: Batch) -> Batch:
        """What other passes can take for this batch: a copy if the model changes it in place."""
        return batch if self._changes_batches is False else copied(batch)

    def __call__(
        self,
        inputs: Any,
        target: Any,
        *,
        beginning: Beginning,
        within: AbstractContextManager[Any] | None = None,
        wrapped: bool = True,
    ) -> ExitLosses:
        """The user's own forward: buffers move as they do in any training step.

        A wrapper, which can be left out, may first give all ranks the buffers of rank 0: the
        beginning is told.
        """

        def look(*_: Any) -> None:
            beginning.buffers = clones(dict(self._inner.named_buffers()))

        model, hook = self._inner, None
        if wrapped and self._model is not self._inner:
            model, hook = self._model, self._inner.register_forward_pre_hook(look, prepend=True)
        try:
            return self._run(model, (inputs, target), within)
        finally:
            if hook is not None:
                hook.remove()

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
        activation checkpointing runs the model again in the backward. Model, exits and loss are
        called ``within`` the context, a compiled model apart.
        """
        batch = self.spare((inputs, target))

        def run() -> T:
            return then(self._run(self._inner, batch, within))

        if getattr(parametrize, "_cache_enabled", 0):
            raise ValueError(
                "`parametrize.cached()` must not be around a step: it would keep the parameters of "
                "one pass for the next."
            )
        copies = clones(buffers)
        own = {id(module.weight) for module in self._renormed}
        names = [name for name, p in self._inner.named_parameters() if id(p) in own] if own else ()
        parameters = {n: p.clone() if n in names else p for n, p in parameters.items()}
        before = [(p, p.detach().clone()) for p in map(self._inner.get_parameter, names)]
        try:
            with placed(self._inner, parameters, tangents or {}) as rest:
                if self.compiled is None:  # for whoever asks for a parameter and means it
                    for tensor in rest.values():
                        if type(tensor) is Tensor:
                            tensor._is_param = True
                return run_with(self._inner, {**copies, **rest}, run)
        finally:
            for parameter, value in before:
                parameter.data.copy_(value)

    def with_features(self, losses: ExitLosses, batch: Batch) -> ExitLosses:
        """The losses, and beside them what the user's function makes of inputs and target.

        A row for each row of the losses; one for each sequence counts for all its tokens.

        Raises:
            TypeError: the function gives something else than a tensor.
            ValueError: that has other rows, or, on the CPU, holds a value that is not finite.
        """
        if self._features is None:
            return losses
        with torch.no_grad():
            features = self._features(*batch)
        if not isinstance(features, Tensor):
            raise TypeError(f"`features` must return a tensor [B, F], got {describe(features)}.")
        num_rows, target = len(losses.losses), batch[1]
        rows = features.flatten(0, -2) if features.dim() > 1 else features.new_empty(0)
        num_targets = len(target) if isinstance(target, Tensor) else num_rows
        if features.dim() == 2 and len(rows) == num_targets and num_rows % num_targets == 0:
            rows = rows.repeat_interleave(num_rows // num_targets, 0)
        if len(rows) != num_rows:
            raise ValueError(
                f"`features` must return a row for each sample, [{num_rows}, F], or of a language "
                f"model [B, F] or [B, T, F], got {list(features.shape)}. Of one number for each "
                "sample, return values.unsqueeze(1)."
            )
        if rows.device.type == "cpu" and not rows.isfinite().all():
            raise ValueError("`features` must return finite values, got one that is not.")
        return losses._replace(features=rows.detach())

    def _run(
        self, model: nn.Module, batch: Batch, within: AbstractContextManager[Any] | None
    ) -> ExitLosses:
        before = [t._version for t in tensors_of(batch) if not t.is_inference()]
        losses = self._losses(model, *batch, within)
        if self._loss is exit_cross_entropy:  # where the classes are is known from here on
            self._loss = partial(exit_cross_entropy, class_dim=-1)
        changes = before != [t._version for t in tensors_of(batch) if not t.is_inference()]
        if changes and self._changes_batches is False:
            raise ValueError(
                "`model` must change its inputs in place in every forward or in none, got a "
                "forward that does after one that did not. Let it begin with a copy of them."
            )
        self._changes_batches = changes or bool(self._changes_batches)
        return losses

    def _outputs(self, model: nn.Module, inputs: Any) -> Any:
        def note() -> str:
            return f"`model` got the inputs of a batch (inputs, target): {describe(inputs)}."

        with noted(note):
            if self.compiled is not None:
                return self.compiled(inputs)
            with as_written():
                return call(model, inputs)

    def _losses(
        self, model: nn.Module, inputs: Any, target: Any, within: AbstractContextManager[Any] | None
    ) -> ExitLosses:
        compiled = self.compiled is not None
        with logits_kept(within is not None and not compiled), ExitStack() as context:
            outputs = self._outputs(model, inputs) if compiled else None
            context.enter_context(within or nullcontext())
            if not compiled:
                outputs = self._outputs(model, inputs)
            logits = outputs if self._exits is None else self._exits(outputs)
            if self._is_plain:  # which needs no help, and would be slower
                context.close()
            if self._align is not None:
                target = self._align(inputs, target)
            result = self._loss(logits, target)
        exit_losses = ExitLosses(result) if isinstance(result, Tensor) else result
        if not isinstance(exit_losses, ExitLosses):
            raise TypeError(
                "`loss` must return ExitLosses or a tensor of losses [samples, exits], got "
                f"{type(result).__name__}."
            )
        own = None if self._auxiliary is None else self._auxiliary()
        if own is not None:
            both = own if exit_losses.auxiliary is None else exit_losses.auxiliary + own
            exit_losses = exit_losses._replace(auxiliary=both)
        for name in ("confidence", "features"):
            beside = getattr(exit_losses, name)
            if beside is not None:
                exit_losses = exit_losses._replace(**{name: beside.detach()})
        if exit_losses.losses.dim() != 2 or exit_losses.losses.numel() == 0:
            raise ValueError(
                "`loss` must return losses of shape [samples, exits], one row for each sample, got "
                f"{list(exit_losses.losses.shape)}. Do not average over the samples."
            )
        _check_fields(exit_losses)
        counted = exit_losses.counted
        if counted is None or self._is_plain:  # whose losses are 0 there
            return exit_losses
        return exit_losses._replace(losses=exit_losses.losses.masked_fill(~counted, 0))


def _check_fields(losses: ExitLosses) -> None:
    """Raise ValueError unless what a loss function adds to its losses fits them."""
    num_samples, num_exits = losses.losses.shape
    for name, value in (("valid", losses.valid), ("weight", losses.weight)):
        if value is not None and value.shape not in ((num_samples,), (num_samples, num_exits)):
            raise ValueError(
                f"`loss` must return ExitLosses with `{name}` [{num_samples}] or [{num_samples}, "
                f"{num_exits}], got {list(value.shape)}."
            )
    weight, valid, auxiliary = losses.weight, losses.valid, losses.auxiliary
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(
            f"`loss` must return ExitLosses with `valid` of torch.bool, got {valid.dtype}. Pass "
            "valid.bool()."
        )
    if weight is not None and weight.device.type == "cpu" and not (weight >= 0).all():
        raise ValueError("`loss` must return ExitLosses with `weight` of at least 0, got others.")
    if auxiliary is not None and auxiliary.dim():
        raise ValueError(
            "`loss` must return ExitLosses with `auxiliary` a scalar, got "
            f"{list(auxiliary.shape)}. Add up its terms, or take their mean."
        )


def held_by_a_part(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """The callable attribute of this name that the model or a module of it has on itself."""
    found = (vars(module).get(name) for module in model.modules())
    return next((each for each in found if callable(each)), None)


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
