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
    statistics = [_statistics(rows, index, dtype, keep) for rows in logits]
    *columns, exponentials = zip(*statistics, strict=True)
    peak, total, at_target, correct = (torch.stack(column) for column in columns)
    log_total = total.log()
    losses = log_total + (peak - at_target)
    if label_smoothing:
        means = torch.stack([rows.mean(1, dtype=dtype) for rows in logits])
        losses = torch.lerp(losses, log_total + (peak - means), label_smoothing)
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


def _statistics(
    rows: Tensor, index: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each row: m, S, the target's logit, whether that is the prediction; and exp(z − m)."""
    # Blocks share a buffer: fresh memory costs more than arithmetic.
    num_rows = len(rows) if keep else min(len(rows), _block_size(rows))
    buffer = rows.new_empty(num_rows, rows.shape[1], dtype=dtype)
    peaks, totals = [], []
    for block in _blocks(rows):
        z = rows[block]
        peak = z.amax(1).to(dtype)
        e = torch.sub(z, peak.unsqueeze(1), out=buffer[block] if keep else buffer[: len(z)])
        peaks.append(peak)
        totals.append(e.exp_().sum(1))
    peak, total = (each[0] if len(each) == 1 else torch.cat(each) for each in (peaks, totals))
    at_target = rows.gather(1, index).squeeze(1).to(dtype)
    # Of equal logits the first is the prediction, and to find it takes time. But two that are
    # largest make S at least 2, so only few rows need be looked at.
    if rows.numel() <= _TINY:
        correct = rows.max(1).indices == index.squeeze(1)
    else:
        correct = at_target == peak
        tied = (correct & (total >= 2)).nonzero().squeeze(1)
        if len(tied):
            correct[tied] = rows[tied].max(1).indices == index[tied, 0]
    return peak, total, at_target, correct, buffer


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
