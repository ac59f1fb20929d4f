"""Which implementation of cross-entropy computes what."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from reweight._kernels.composite import is_small

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")

_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
_OLDEST_TRITON = (3, 2)
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
        got = sorted({f"{z.dtype} on {z.device}" for z in exits})
        raise ValueError(
            "`impl='triton'` needs the package triton, 3.2 or newer, and logits on one GPU and of "
            f"one dtype, float32, float16 or bfloat16, got {', '.join(got)}. Use 'auto'."
        )
    if impl == "auto":
        if exits[0].device.type == "cpu":
            return "reference" if is_small(exits) else "torch"
        return "triton" if _fits_triton(exits) else "reference"
    return impl


def choose_linear(hidden: Sequence[Tensor]) -> str:
    """The same for logits that are made of these hidden states, chunk by chunk."""
    on_cpu = hidden[0].device.type == "cpu"
    return "torch" if on_cpu or not _fits_triton(hidden) else "triton"


def _fits_triton(logits: Sequence[Tensor]) -> bool:
    kinds = {(z.device, z.dtype) for z in logits}
    on_gpu = logits[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return len(kinds) == 1 and logits[0].dtype in _TRITON and on_gpu and _has_triton()


def is_traced() -> bool:
    """Whether a compiler, a tracer or a transform of torch.func looks on.

    Compilers know no function with a forward mode of its own, but fuse plain operations well;
    transforms lose the outer tangent of such a function where they nest; tracers have no values.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(map(torch._C._get_dispatch_mode, _TRACERS))
    )


@functools.cache
def _has_triton() -> bool:
    """Whether there is a Triton that a supported PyTorch may come with."""
    if importlib.util.find_spec("triton") is None:
        return False
    # Of the module: what it is distributed as has several names.
    major, minor, *_ = importlib.import_module("triton").__version__.split(".")
    return (int(major), int(minor)) >= _OLDEST_TRITON
