"""What PyTorch would compile or run backward in a way of its own, run as the user wrote it."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor

from reweight._passes.operations import have_tangents

_conditionals: Any = importlib.import_module("torch._higher_order_ops.cond")


@contextmanager
def as_written() -> Iterator[None]:
    """Within, nothing is compiled, and ``torch.cond`` and reentrant checkpointing are plain code.

    ``torch.cond`` cannot do without the compiler otherwise, and reentrant checkpointing neither has
    gradients of chosen inputs nor tangents. Values and gradients are the same.
    """
    before = checkpointing.CheckpointFunction, _conditionals.cond_op
    checkpointing.CheckpointFunction, _conditionals.cond_op = _Checkpoint, _cond  # type: ignore[assignment,misc]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        checkpointing.CheckpointFunction, _conditionals.cond_op = before  # type: ignore[misc]


class _Checkpoint:
    """In the place of reentrant checkpointing: the other kind."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """As reentrant checkpointing does, which has gradients only if an argument has."""
        tensors = [each for each in args if isinstance(each, Tensor)]
        if not (have_tangents(tensors) or any(each.requires_grad for each in tensors)):
            with torch.no_grad():
                return function(*args)
        return checkpointing.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve
        )


def _cond(
    condition: bool | Tensor,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    operands: Sequence[Any],
) -> Any:
    return (true_fn if condition else false_fn)(*operands)
