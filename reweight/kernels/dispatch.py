"""Which implementation of cross-entropy computes what."""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")

_TRITON = {torch.float32, torch.float16, torch.bfloat16}


def choose(
    impl: str,
    exits: Sequence[Tensor],
    target: Tensor,
    label_smoothing: float,
    class_weight: Tensor | None,
) -> str:
    """Which implementation is to compute this."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"`impl` must be one of {IMPLEMENTATIONS}, got {impl!r}.")
    fits = not target.is_floating_point() and not (label_smoothing and class_weight is not None)
    if impl in ("torch", "triton") and not fits:
        raise ValueError(
            f"`impl` must be 'auto' or 'reference' for probabilities as the target and for label "
            f"smoothing with class weights, got {impl!r}."
        )
    if impl == "reference" or not fits or is_traced():
        return "reference"
    if impl == "triton" and not _fits_triton(exits):
        raise ValueError(
            "`impl='triton'` needs the package triton and logits of one dtype, float32, float16 or "
            f"bfloat16, got {sorted({str(z.dtype) for z in exits})}. Use 'auto'."
        )
    if impl == "auto":
        on_gpu = exits[0].device.type == "cuda" and _fits_triton(exits)
        return "torch" if exits[0].device.type == "cpu" else "triton" if on_gpu else "reference"
    return impl


def choose_linear(hidden: Sequence[Tensor]) -> str:
    """The same for logits that are made of these hidden states, chunk by chunk."""
    on_gpu = hidden[0].device.type == "cuda" and _fits_triton(hidden)
    return "triton" if on_gpu else "torch"


def _fits_triton(logits: Sequence[Tensor]) -> bool:
    dtypes = {z.dtype for z in logits}
    return len(dtypes) == 1 and dtypes <= _TRITON and _has_triton()


def is_traced() -> bool:
    """Whether a compiler or a transform of torch.func looks on.

    Compilers know no function with a forward mode of its own, but fuse plain operations well;
    transforms lose the outer tangent of such a function where they nest.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
