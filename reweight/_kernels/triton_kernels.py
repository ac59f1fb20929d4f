"""Cross-entropy of all exits in one Triton launch for each mode.

With S the bytes of all logits, the forward pass reads S, the backward pass reads S and writes S,
forward mode reads 2·S: the least there is. All else is O(K·N); the latter two read no ignored row.
Statistics are float32 whatever the dtype of the logits, and what is rounded is rounded once. A
target out of range gives a NaN loss: looking from the host would wait for the device.
"""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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
@triton.jit(do_not_specialize=list(range(10)))
def forward_kernel(
    table,
    target,
    losses,
    confidence,
    correct,
    peak,
    scale,
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
    p_max = tl.where(s > 0, 1 / s, float("nan"))
    tl.store(confidence + out, p_max, mask=inside)
    tl.store(scale + out, p_max, mask=inside)
    tl.store(correct + out, valid & (z_y == m) & (z_y > before) & (s > 0), mask=inside)
    tl.store(peak + out, m, mask=inside)


@triton.jit(do_not_specialize=list(range(10)))
def backward_kernel(
    table,
    target,
    peak,
    scale,
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
    p_max = tl.load(scale + index * num_rows + row, mask=valid)[:, None]
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
def tangent_kernel(
    table,
    target,
    peak,
    scale,
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
    m, p_max = tl.load(peak + at, mask=valid), tl.load(scale + at, mask=valid)
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
