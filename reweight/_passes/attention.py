"""Which of PyTorch's kernels of attention may run.

Fused ones have neither forward mode nor double backward, and draw their dropout in their own ways.
"""

import types
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain operations, which have forward mode and a double backward."""
    with no_fast_path(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Layers of attention call the functions that they are made of."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


attention_layer = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's own, but as a mode sees it: the functions that it calls, instead of the whole."""

in_plain_operations = sdpa_kernel(SDPBackend.MATH)(F.scaled_dot_product_attention)
"""Attention with a derivative of any kind, whatever the model has chosen."""


class PlainDropout(TorchFunctionMode):
    """Attention with dropout as plain operations, so that all passes draw the same mask.

    On the CPU it is anyway: there no fused kernel has dropout.
    """

    @classmethod
    def on(cls, devices: Iterable[torch.device]) -> AbstractContextManager[Any]:
        """Of that for a model on these devices; of nothing where it is so without."""
        return nullcontext() if {device.type for device in devices} <= {"cpu"} else cls()

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, in plain operations if it is attention with dropout."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_layer(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            dropout_p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0)
            func = in_plain_operations if dropout_p else func
        return func(*args, **kwargs)
