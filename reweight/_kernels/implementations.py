"""The kernels by the name of their implementation, "torch" or "triton", for plain tensors alone."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from reweight._kernels import torch_kernels

_NO_CLASS = -1


def kernel_forward(
    implementation: str,
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Losses, confidence, correctness, peak (the largest logit) and scale, all [K, N].

    At the end the exponentials, of "torch" alone, if they are kept. The scale, 1/Σ_c exp(z_c -
    peak), is the confidence once more, for whoever differentiates: what a user was given may be
    changed in place.

    Args:
        implementation: "torch" or "triton", which takes float32, float16 and bfloat16.
        logits: K tensors [N, C_k], for Triton of one dtype.
        target: class indices, int64, shape [N].
        ignore_index: rows with this target have loss 0 and are not correct, whatever they hold;
            None if there are none.
        label_smoothing: ε in [0, 1].
        keep: whether the exponentials are wanted.
    """
    if implementation == "torch":
        results = torch_kernels.forward(logits, target, ignore_index, label_smoothing, keep)
        return *results[:4], results[1].clone(), results[4]
    rows, table, options = prepare(logits, logits)
    shape = len(rows), len(target)
    losses, confidence, peak, scale = (
        target.new_empty(shape, dtype=torch.float32) for _ in range(4)
    )
    correct = target.new_empty(shape, dtype=torch.bool)
    options["SMOOTHING"] = label_smoothing > 0
    outputs = losses, confidence, correct, peak, scale
    _launch("forward", table, target, outputs, ignore_index, label_smoothing, options)
    return *outputs, []


def kernel_backward(
    implementation: str,
    sources: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    peak: Tensor | None,
    scale: Tensor,
    upstream: Tensor,
    in_place: bool,
) -> list[Tensor]:
    """upstream·(p − q) of each exit, contiguous, in the dtype of the logits.

    Args:
        implementation: like the next four as in :func:`kernel_forward`.
        sources: the logits; or of "torch" their exponentials.
        target: class indices.
        ignore_index: rows with this target have gradient 0, whatever they hold.
        label_smoothing: ε in [0, 1].
        peak: as the forward gave it; None if the sources are exponentials.
        scale: as the forward gave it.
        upstream: the gradient by the losses, shape [K, N], any strides.
        in_place: whether the gradients may take the place of the sources in memory.
    """
    if implementation == "torch":
        return torch_kernels.backward(
            sources, target, ignore_index, label_smoothing, peak, scale, upstream, in_place
        )
    gradients = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in sources]
    rows, table, options = prepare(sources, gradients)
    num_blocks = -(-max(z.shape[1] for z in rows) // options["BLOCK"])
    given = peak, scale, upstream, *upstream.stride()
    _launch("backward", table, target, given, ignore_index, label_smoothing, options, num_blocks)
    return gradients


def kernel_tangent(
    implementation: str,
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    peak: Tensor,
    scale: Tensor,
    moved: Sequence[Tensor],
) -> Tensor:
    """⟨p − q, dz⟩, [K, N]: what the losses move by if the logits move so."""
    if implementation == "torch":
        return torch_kernels.tangent(
            logits, target, ignore_index, label_smoothing, peak, scale, moved
        )
    _, table, options = prepare(logits, moved := [dz.contiguous() for dz in moved])
    # Half as many entries for each thread, for there are two matrices to hold.
    options |= {"BLOCK": min(options["BLOCK"], 4096), "num_warps": 8}
    given = peak, scale, products = peak, scale, torch.empty_like(peak)
    _launch("tangent", table, target, given, ignore_index, label_smoothing, options)
    return products


def _launch(
    mode: str,
    table: Tensor,
    target: Tensor,
    tensors: tuple[Any, ...],
    ignore_index: int | None,
    label_smoothing: float,
    options: dict[str, Any],
    num_blocks: int = 1,
) -> None:
    from reweight._kernels import triton_kernels  # which are not there everywhere

    kernel = getattr(triton_kernels, f"{mode}_kernel")
    ignored = _NO_CLASS if ignore_index is None else ignore_index
    with torch.cuda.device_of(target):
        kernel[(-(-len(target) // options["ROWS"]), len(table), num_blocks)](
            *(table, target.contiguous(), *tensors),
            *(len(target), ignored, float(label_smoothing)),
            **options,
        )


def prepare(
    logits: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """The logits to read, the table of where each exit and its gradient lie, the configuration."""
    rows = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
    dtype, size, device = rows[0].dtype, rows[0].element_size(), rows[0].device
    entries = tuple(
        (z.data_ptr(), d.data_ptr(), z.shape[1], z.stride(0))
        for z, d in zip(rows, gradients, strict=True)
    )
    # The widest access, up to 128 bits, for which all rows begin and end at a multiple of it.
    alignment = math.gcd(
        16, *(b for z, d, classes, stride in entries for b in (z, d, classes * size, stride * size))
    )
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    # A graph that is captured may be run when the table has been forgotten.
    captures = stream is not None and torch.cuda.is_current_stream_capturing()
    table = (_table.__wrapped__ if captures else _table)(entries, device, stream)
    return rows, table, configuration(max(z.shape[1] for z in rows), dtype, alignment)


@functools.lru_cache(maxsize=64)  # training mostly finds its logits where they were a step before
def _table(
    entries: tuple[tuple[int, ...], ...], device: torch.device, stream: int | None
) -> Tensor:
    # From pageable memory this small copy is staged at once: it does not wait for the device.
    return torch.tensor(entries).to(device, non_blocking=True)


def configuration(num_classes: int, dtype: torch.dtype, alignment: int) -> dict[str, Any]:
    """How the kernels are compiled for logits of at most this many classes.

    At most 8,192 elements a program and 32 a thread: beyond that registers spill. Rows of few
    classes share a program, 4 elements a thread: they may all lie in different rows, and what is
    kept of a row takes more registers than its element.
    """
    from reweight._kernels.triton_kernels import DTYPES

    block = min(1 << (num_classes - 1).bit_length(), 8192)
    rows = max(1, 512 // block)
    return {
        "DTYPE": DTYPES[dtype],
        "ALIGNMENT": alignment,
        "VECTOR": alignment // dtype.itemsize,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": 4 if rows * block <= 4096 else 8,
        "enable_fp_fusion": True,  # Triton is changing its default, and warns
    }


def is_plain(*tensors: Tensor) -> bool:
    """Whether values are all there is to these tensors: no tangent, no transform around them."""
    return not torch._C._are_functorch_transforms_active() and not any(
        torch._C._functorch.is_legacy_batchedtensor(tensor)  # autograd.grad(is_grads_batched=True)
        or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )
