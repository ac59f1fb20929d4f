"""Cross-entropy of all exits in one Triton launch for each mode; no autograd here.

With S the bytes of all logits, the forward pass reads S, the backward pass reads S and writes S,
forward mode reads 2·S: the least there is. All else is O(K·N); the latter two read no ignored row.
Statistics are float32 whatever the dtype of the logits, and what is rounded is rounded once. A
target out of range gives a NaN loss: looking from the host would wait for the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def forward(
    logits: Sequence[Tensor], target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, confidence, correctness and peak (the largest logit) of every row at every exit.

    Args:
        logits: K tensors [N, C_k] of one dtype: float32, float16 or bfloat16.
        target: class indices, int64, shape [N].
        ignore_index: rows with this target have loss 0 and are not correct, whatever they hold.
        label_smoothing: ε in [0, 1].

    Returns:
        Four tensors [K, N]: float32, float32, bool, float32. Of equal logits the first is the
        prediction.
    """
    rows, table, options = _prepare(logits, logits)
    target = target.contiguous()
    shape = (len(rows), len(target))
    losses, confidence, peak = (target.new_empty(shape, dtype=torch.float32) for _ in range(3))
    correct = target.new_empty(shape, dtype=torch.bool)
    with torch.cuda.device_of(target):
        _forward_kernel[(triton.cdiv(len(target), options["ROWS"]), len(rows))](
            *(table, target, losses, confidence, correct, peak),
            *(len(target), ignore_index, float(label_smoothing)),
            SMOOTHING=label_smoothing > 0,
            **options,
        )
    return losses, confidence, correct, peak


def backward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    peak: Tensor,
    confidence: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """The gradient of ``(upstream * losses).sum()`` with respect to the logits of each exit.

    Args:
        logits: as in :func:`forward`, like the next three.
        target: class indices.
        ignore_index: rows with this target have gradient 0, whatever they hold.
        label_smoothing: ε in [0, 1].
        peak: as :func:`forward` returned it, like the confidence.
        confidence: 1/Σ_c exp(z_c - peak).
        upstream: the gradient with respect to the losses, shape [K, N], any strides.

    Returns:
        K contiguous tensors [N, C_k] in the dtype of the logits.
    """
    gradients = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]
    rows, table, options = _prepare(logits, gradients)
    target = target.contiguous()
    num_blocks = triton.cdiv(max(z.shape[1] for z in rows), options["BLOCK"])
    with torch.cuda.device_of(target):
        _backward_kernel[(triton.cdiv(len(target), options["ROWS"]), len(rows), num_blocks)](
            *(table, target, peak, confidence, upstream, *upstream.stride()),
            *(len(target), ignore_index, float(label_smoothing)),
            **options,
        )
    return gradients


def tangent(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    peak: Tensor,
    confidence: Tensor,
    moved: Sequence[Tensor],
) -> Tensor:
    """What the losses move by, [K, N], if the logits move so; all else as in :func:`backward`."""
    rows, table, options = _prepare(logits, moved := [dz.contiguous() for dz in moved])
    options["num_warps"] *= 2  # which hold two matrices
    target, products = target.contiguous(), torch.empty_like(peak)
    with torch.cuda.device_of(target):
        _tangent_kernel[(triton.cdiv(len(target), options["ROWS"]), len(rows))](
            *(table, target, peak, confidence, products),
            *(len(target), ignore_index, float(label_smoothing)),
            **options,
        )
    return products


def configuration(num_classes: int, dtype: torch.dtype, alignment: int) -> dict[str, Any]:
    """How the kernels are compiled for logits of at most this many classes.

    At most 8,192 elements a program and 32 a thread: beyond that registers spill. Rows of few
    classes share a program, 4 elements a thread: they may all lie in different rows, and what is
    kept of a row takes more registers than its element.
    """
    block = min(triton.next_power_of_2(num_classes), 8192)
    rows = max(1, 512 // block)
    return {
        "DTYPE": _DTYPES[dtype],
        "ALIGNMENT": alignment,
        "VECTOR": alignment // dtype.itemsize,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": 4 if rows * block <= 4096 else 8,
        "enable_fp_fusion": True,  # Triton is changing its default, and warns
    }


def _prepare(
    logits: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """The logits to read, the table of where each exit lies, the configuration."""
    rows = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
    dtype, size = rows[0].dtype, rows[0].element_size()
    entries = [
        (z.data_ptr(), d.data_ptr(), z.shape[1], z.stride(0))
        for z, d in zip(rows, gradients, strict=True)
    ]
    # The widest access, up to 128 bits, for which all rows begin and end at a multiple of it.
    alignment = math.gcd(
        16, *(b for z, d, classes, stride in entries for b in (z, d, classes * size, stride * size))
    )
    # From pageable memory this small copy is staged at once: it does not wait for the device.
    table = torch.tensor(entries).to(rows[0].device, non_blocking=True)
    return rows, table, configuration(max(z.shape[1] for z in rows), dtype, alignment)


@triton.jit
def _exit(table, index, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr):
    """Logits, gradient, number of classes and row stride of an exit, with what is known of them."""
    entry = table + 4 * index
    logits = tl.load(entry).to(tl.pointer_type(DTYPE))
    gradient = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    num_classes = tl.load(entry + 2).to(tl.int32)
    stride = tl.load(entry + 3)  # int64: a row times its stride may pass 2^31
    return (
        tl.multiple_of(logits, ALIGNMENT),
        tl.multiple_of(gradient, ALIGNMENT),
        tl.multiple_of(num_classes, VECTOR),
        tl.multiple_of(stride, VECTOR),
    )


@triton.jit
def _rows(target, num_rows, ignore_index, ROWS: tl.constexpr):
    """The rows of this program, which of them there are, their classes, and which count."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    y = tl.load(target + row, mask=inside, other=ignore_index)
    return row, inside, y, y != ignore_index


# Nothing is specialized on: one compilation serves every size, value and alignment of an argument.
@triton.jit(do_not_specialize=list(range(9)))
def _forward_kernel(
    table,
    target,
    losses,
    confidence,
    correct,
    peak,
    num_rows,
    ignore_index,
    smoothing,
    SMOOTHING: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(1)
    logits, _, num_classes, stride = _exit(table, index, DTYPE, ALIGNMENT, VECTOR)
    row, inside, y, valid = _rows(target, num_rows, ignore_index, ROWS)
    first = logits + row * stride
    known = inside & (y >= 0) & (y < num_classes)
    z_y = tl.load(first + y, mask=known, other=float("nan")).to(tl.float32)
    y = y.to(tl.int32)

    # m = max_c z_c and s = Σ_c exp(z_c - m), block by block: as m grows, s shrinks by exp(m_old -
    # m). m begins at the least float32, not at -inf, so that a block of -inf adds 0, not NaN.
    m = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    before = tl.full([ROWS], -float("inf"), tl.float32)  # max_{c<y} z_c
    gap = tl.zeros([ROWS], tl.float32)  # Σ_c (m - z_c)
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < num_classes)
        z = tl.load(first[:, None] + column, mask=mask, other=-float("inf")).to(tl.float32)
        # First of all: a comparison that comes later is made here all the same, and kept till then
        # in a register for each element.
        before = tl.maximum(before, tl.max(tl.where(column < y[:, None], z, -float("inf")), 1))
        m_old, m = m, tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m_old - m) + tl.sum(tl.exp(z - m[:, None]), 1)
        if SMOOTHING:
            gap += start * (m - m_old) + tl.sum(tl.where(mask, m[:, None] - z, 0.0), 1)

    # l = (1 - ε) (log s + m - z_y) + ε (log s + m - mean_c z_c). The difference from m comes first:
    # log s + m would lose log s in a large m.
    loss = tl.log(s) + (m - z_y)
    if SMOOTHING:
        loss = (1 - smoothing) * loss + smoothing * (tl.log(s) + gap / num_classes)
    out = index.to(tl.int64) * num_rows + row
    tl.store(losses + out, tl.where(valid, loss, 0.0), mask=inside)
    # s > 0 fails where s is NaN or all logits are -inf: no probabilities, no prediction.
    tl.store(confidence + out, tl.where(s > 0, 1 / s, float("nan")), mask=inside)
    tl.store(correct + out, valid & (z_y == m) & (z_y > before) & (s > 0), mask=inside)
    tl.store(peak + out, m, mask=inside)


@triton.jit(do_not_specialize=list(range(10)))
def _backward_kernel(
    table,
    target,
    peak,
    confidence,
    upstream,
    upstream_exit_stride,
    upstream_row_stride,
    num_rows,
    ignore_index,
    smoothing,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(1).to(tl.int64)
    logits, gradient, num_classes, stride = _exit(table, index, DTYPE, ALIGNMENT, VECTOR)
    row, inside, y, valid = _rows(target, num_rows, ignore_index, ROWS)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = tl.load(peak + index * num_rows + row, mask=valid)[:, None]
    p_max = tl.load(confidence + index * num_rows + row, mask=valid)[:, None]
    at = upstream + index * upstream_exit_stride + row * upstream_row_stride
    g = tl.load(at, mask=valid)[:, None]
    mask = valid[:, None] & (column < num_classes)
    z = tl.load(logits + (row * stride)[:, None] + column, mask=mask).to(tl.float32)

    # dl/dz_c = exp(z_c - m) / s - q_c with q_c = (1 - ε) [c = y] + ε / C, and 1 / s = p_max
    q = tl.where(column == y.to(tl.int32)[:, None], 1 - smoothing, 0.0) + smoothing / num_classes
    dz = tl.where(mask, g * (tl.exp(z - m) * p_max - q), 0.0)
    out = gradient + (row * num_classes)[:, None] + column
    tl.store(out, dz.to(DTYPE), mask=inside[:, None] & (column < num_classes))


@triton.jit(do_not_specialize=list(range(8)))
def _tangent_kernel(
    table,
    target,
    peak,
    confidence,
    products,
    num_rows,
    ignore_index,
    smoothing,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(1).to(tl.int64)
    logits, moved, num_classes, stride = _exit(table, index, DTYPE, ALIGNMENT, VECTOR)
    row, inside, y, valid = _rows(target, num_rows, ignore_index, ROWS)
    known, at = valid & (y >= 0) & (y < num_classes), index * num_rows + row
    m, p_max = tl.load(peak + at, mask=valid), tl.load(confidence + at, mask=valid)
    first, first_moved = logits + row * stride, moved + row * num_classes
    dz_y = tl.load(first_moved + y, mask=known, other=float("nan")).to(tl.float32)
    # dl = Σ_c exp(z_c - m) dz_c / s - Σ_c q_c dz_c with q_c = (1 - ε) [c = y] + ε / C
    mixed, total = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = valid[:, None] & (column < num_classes)
        z = tl.load(first[:, None] + column, mask=mask, other=-float("inf")).to(tl.float32)
        dz = tl.load(first_moved[:, None] + column, mask=mask, other=0.0).to(tl.float32)
        mixed += tl.sum(tl.where(mask, tl.exp(z - m[:, None]) * dz, 0.0), 1)
        total += tl.sum(dz, 1)
    mixed = mixed * p_max - (1 - smoothing) * dz_y - smoothing / num_classes * total
    tl.store(products + at, tl.where(valid, mixed, 0.0), mask=inside)
