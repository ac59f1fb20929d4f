"""A model of ``torch.compile`` in the passes of the step: all of them compiled, or none.

Compiled code has no forward mode, but a function with forward mode in it can be compiled: the
compiler then fuses the tangents with the values. Compiled code also draws random numbers in a way
of its own, which the passes must share.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from reweight._passes.attention import plain_attention
from reweight._passes.forward import call
from reweight._passes.forward_mode import TangentsWithGradients
from reweight._passes.functional import run_with
from reweight._passes.hooks import HookChangesError
from reweight._passes.ladder import NotCompiledError
from reweight._structure import structure_of

_logger = logging.getLogger("reweight")
Method = TypeVar("Method", bound=Callable[..., Any])


class CompiledModel:
    """Inputs → outputs, by a model of ``torch.compile`` with its parameters as they are now.

    Where they are dual numbers, so are the outputs.

    Args:
        model: what ``torch.compile`` returned.
    """

    def __init__(self, model: nn.Module) -> None:
        compile: Any = model.dynamo_ctx  # as the user asked for it
        self._model: nn.Module = model._orig_mod  # type: ignore[assignment]
        # Graphs that are run backward twice must not give their memory away. For good, since those
        # of changing shapes are completed only in the backward.
        torch._functorch.config.donated_buffer = False
        self._forward = compile(_forward)
        self._forward_mode = compile(torch._dynamo.error_on_graph_break(True)(_forward_mode))

    @classmethod
    def of(cls, model: nn.Module) -> "CompiledModel | None":
        """That of this model; None if it is not compiled, or if PyTorch is too old for it."""
        known = hasattr(model, "dynamo_ctx") and hasattr(torch._dynamo, "error_on_graph_break")
        return cls(model) if known else None

    def __call__(self, inputs: Any) -> Any:
        """What the model makes of a tensor, a tuple or list of arguments, or a dict of named ones.

        Raises:
            NotCompiledError: PyTorch does not compile it, or not in one piece with dual numbers.
        """
        structure = structure_of(self._model)
        duals = {  # each place by a name of its own, as functional_call has it
            place.path: forward_ad.unpack_dual(structure.parameters[place.name])
            for place in structure.places
            if place.name in structure.parameters
        }
        tangents = {name: dual.tangent for name, dual in duals.items() if dual.tangent is not None}
        if not tangents:
            outputs, compiled = self._forward(self._model, inputs)
            if not compiled:
                raise NotCompiledError("PyTorch has left the forward uncompiled.")
            return outputs
        state = {name: dual.primal for name, dual in duals.items()}
        try:
            with plain_attention():
                # The compiler refuses a model that holds dual numbers; it makes them itself.
                pairs, form, compiled = run_with(
                    self._model,
                    state,
                    lambda: self._forward_mode(self._model, state, tangents, inputs),
                )
        except RuntimeError as error:
            raise NotCompiledError(str(error)) from error
        if not compiled:
            raise NotCompiledError("PyTorch has left the forward-mode pass uncompiled.")
        outputs = [z if dz is None else forward_ad.make_dual(z, dz) for z, dz in pairs]
        return tree_unflatten(outputs, form)


def again_if_need_be(method: Method) -> Method:
    """Makes a call of the step's begin once more, as if it had not been.

    Without compilation, where a pass has none; with the hooks that turned out to belong to it.
    """

    @functools.wraps(method)
    def run(step: Any, *args: Any, **kwargs: Any) -> Any:
        while True:
            was_cold = step._learner.was_cold
            try:
                return method(step, *args, **kwargs)
            except HookChangesError:
                step._learner.was_cold, step._estimator.check.is_first = was_cold, True
            except NotCompiledError as error:
                if step._forward.compiled is None:
                    raise
                step._forward.compiled = None
                step._lookahead.waiting = None  # whose masks may be compiled code's
                reason = str(error).strip().splitlines()[0]
                _logger.warning("The model runs uncompiled from here on: %s", reason)

    return run  # type: ignore[return-value]


class _Traced(TangentsWithGradients):
    """The same, where the compiler would stumble."""

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function."""
        if func is Tensor.unflatten:  # of which it does not know what is called in there
            func = torch.unflatten
        result = super().__torch_function__(func, classes, args, kwargs)
        if func in _NORMS:  # whose tangent it takes for float32 if the weight is, or is not
            value, tangent = forward_ad.unpack_dual(result)
            if tangent is not None and tangent.dtype != value.dtype:
                result = forward_ad.make_dual(value, tangent.to(value.dtype))
        return result


_NORMS = (F.batch_norm, F.layer_norm, F.group_norm)


def _forward(model: nn.Module, inputs: Any) -> tuple[Any, bool]:
    """The outputs, and whether they are compiled code's."""
    return call(model, inputs), torch.compiler.is_compiling()


def _forward_mode(
    model: nn.Module, state: dict[str, Tensor], tangents: dict[str, Tensor], inputs: Any
) -> tuple[list[tuple[Any, Any]], Any, bool]:
    """The outputs with their tangents, what they are the leaves of, and as above."""
    with _Traced():  # of the dual level that is there
        duals = {n: forward_ad.make_dual(state[n], tangents[n]) for n in tangents}
        outputs = call(
            lambda *args, **kwargs: functional_call(
                model, {**state, **duals}, args, kwargs, tie_weights=False
            ),
            inputs,
        )
        leaves, structure = tree_flatten(outputs)
        if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
            raise RuntimeError("The model returns something else than containers of tensors.")
        pairs = [(None, None) if z is None else tuple(forward_ad.unpack_dual(z)) for z in leaves]
    return pairs, structure, torch.compiler.is_compiling()
