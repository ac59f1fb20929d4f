"""Cross-entropy of several exits by few PyTorch operations, block by block, for the CPU.

For one row, with m = max z and S = Σ exp(z − m)::

    l = log S + m − ⟨q, z⟩        confidence = 1 / S        ∂l/∂z = exp(z − m) / S − q

where q = (1 − ε)·1_y + ε / C. One pass gives all three results, and its exponentials, if they are
kept, become the gradient in place: the size of the logits is read and written once forward and once
backward, where the usual loop of ``F.cross_entropy`` and ``softmax().max()`` does so 9 times.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# A block that four operations pass over stays in the second-level cache.
_BLOCK = 2**17
# Up to here the whole matrix nearly does, and fewer operations are called.
_WHOLE = 2**20
# And up to here it is calls that cost, not what they do.
_TINY = 2**15


def forward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Losses, confidence, correctness, peak m, all [K, N], and exp(z − m) if it is to be kept.

    The logits are K matrices [N, C_k], the target is [N] classes, all valid if ``ignore_index`` is
    None.
    """
    dtype = functools.reduce(torch.promote_types, [rows.dtype for rows in logits], torch.float32)
    valid, index = _classes(target, ignore_index)
    parts = [_statistics(rows, index, dtype, label_smoothing, keep) for rows in logits]
    *columns, gaps, exponentials = zip(*parts, strict=True)
    peak, total, at_target = (torch.stack(column) for column in columns)
    log_total = total.log()
    losses = log_total + (peak - at_target)
    if label_smoothing:
        uniform = log_total - torch.stack(gaps)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    correct = _correct(logits, target, at_target == peak, total)
    if valid is not None:
        losses, correct = torch.where(valid, losses, 0), correct & valid
    return losses, total.reciprocal_(), correct, peak, list(exponentials) if keep else []


def backward(
    sources: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    peak: Tensor | None,
    confidence: Tensor,
    upstream: Tensor,
    in_place: bool = False,
) -> list[Tensor]:
    """upstream·(exp(z − m) / S − q) of each exit.

    The sources are the logits, or, if the peak is None, the exponentials. These may become the
    result in place.
    """
    valid, index = _classes(target, ignore_index)
    scale, at_target = upstream * confidence, (label_smoothing - 1) * upstream
    gradients = []
    for k, rows in enumerate(sources):
        gradient = rows if in_place else rows.new_empty(rows.shape)
        for block in _blocks(rows):
            if peak is None:
                d = torch.mul(rows[block], scale[k, block].unsqueeze(1), out=gradient[block])
            else:
                d = (rows[block] - peak[k, block].unsqueeze(1)).exp_()
                d.mul_(scale[k, block].unsqueeze(1))
            if label_smoothing:
                share = label_smoothing / rows.shape[1]
                d.sub_(upstream[k, block].unsqueeze(1), alpha=share)
            d.scatter_add_(1, index[block], at_target[k, block].unsqueeze(1))
            if peak is not None:
                gradient[block] = d  # low precision: rounded once
        if valid is not None:
            gradient[~valid] = 0  # also where the row is not a number
        gradients.append(gradient)
    return gradients


def tangent(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    peak: Tensor,
    confidence: Tensor,
    moved: Sequence[Tensor],
) -> Tensor:
    """⟨p − q, dz⟩ of each row [K, N], with dz what the logits move by."""
    valid, index = _classes(target, ignore_index)
    products = []
    for k, (rows, dz) in enumerate(zip(logits, moved, strict=True)):
        parts = []
        for block in _blocks(rows):
            e = (rows[block] - peak[k, block].unsqueeze(1)).exp_()
            parts.append(e.mul_(dz[block]).sum(1))
        product = _joined(parts) * confidence[k]
        product.sub_(dz.gather(1, index).squeeze(1), alpha=1 - label_smoothing)
        products.append(product.sub_(dz.mean(1), alpha=label_smoothing))
    result = torch.stack(products)
    return result if valid is None else torch.where(valid, result, 0)


def _statistics(
    rows: Tensor, index: Tensor, dtype: torch.dtype, label_smoothing: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Of each row: m, S, z_y, the mean of z − m if it is needed; and exp(z − m)."""
    # Blocks share a buffer: fresh memory costs more than arithmetic.
    num_rows = len(rows) if keep else min(len(rows), _block_size(rows))
    buffer = rows.new_empty(num_rows, rows.shape[1], dtype=dtype)
    peaks, totals, gaps = [], [], []
    for block in _blocks(rows):
        z = rows[block]
        peak = z.amax(1).to(dtype)
        e = torch.sub(z, peak.unsqueeze(1), out=buffer[block] if keep else buffer[: len(z)])
        if label_smoothing:
            gaps.append(e.mean(1))
        peaks.append(peak)
        totals.append(e.exp_().sum(1))
    at_target = rows.gather(1, index).squeeze(1).to(dtype)
    return _joined(peaks), _joined(totals), at_target, _joined(gaps) if gaps else None, buffer


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _correct(logits: Sequence[Tensor], target: Tensor, is_largest: Tensor, total: Tensor) -> Tensor:
    """Whether the target is the first of the largest logits, which takes time to find.

    But two that are largest make S at least 2, so only few rows need be looked at. Where S is less
    than 1 or no number, there are no probabilities, and there is no prediction.
    """
    correct = is_largest & (total >= 1)
    if len(logits) == 1 and logits[0].numel() <= _TINY:
        return correct & (logits[0].max(1).indices == target)
    exits, rows = (correct & (total >= 2)).nonzero(as_tuple=True)
    if len(rows):
        of_each = rows.split(torch.bincount(exits, minlength=len(logits)).tolist())
        firsts = [
            z.index_select(0, some).argmax(1) for z, some in zip(logits, of_each, strict=True)
        ]
        correct[exits, rows] = torch.cat(firsts) == target[rows]
    return correct


def _classes(target: Tensor, ignore_index: int | None) -> tuple[Tensor | None, Tensor]:
    """Which rows are valid, None for all, and the class of each [N, 1], 0 where it is not."""
    if ignore_index is None:
        return None, target.unsqueeze(1)
    valid = target != ignore_index
    return valid, torch.where(valid, target, 0).unsqueeze(1)


def _block_size(rows: Tensor) -> int:
    num_rows, num_classes = rows.shape
    return num_rows if num_rows * num_classes <= _WHOLE else max(1, _BLOCK // num_classes)


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = _block_size(rows)
    return (slice(start, start + size) for start in range(0, len(rows), size))
