"""Cross-entropy in plain differentiable operations: the reference, and what compilers fuse.

With z a row of logits, q its target distribution (class weights and smoothing included), s = Σ q
and p = softmax(z)::

    l = −⟨q, log p⟩          ∂l/∂z = s·p − q
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to so many elements: below, PyTorch's own derivatives also cost less than functions of ours.
_SMALL = 2**15
_VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32  # bytes
_MANY = 128  # rows; below, two more operations cost more


def forward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, confidence and correctness [N, K] of K matrices [N, C_k].

    The target is [N, C] probabilities, or [N] classes, all valid if ``ignore_index`` is None.
    """
    if len(logits) > 1 and is_small(logits):  # one call for all exits costs what it does for one
        repeated = torch.cat([target] * len(logits))
        rest = ignore_index, label_smoothing, class_weight
        merged = _of_exit(torch.cat(list(logits)), repeated, *rest)
        losses, confidence, correct = (each.view(len(logits), -1).t() for each in merged)
        return losses, confidence, correct
    parts = [_of_exit(rows, target, ignore_index, label_smoothing, class_weight) for rows in logits]
    if len(parts) == 1:
        losses, confidence, correct = (each.unsqueeze(1) for each in parts[0])
        return losses, confidence, correct
    losses, confidence, correct = (torch.stack(each, 1) for each in zip(*parts, strict=True))
    return losses, confidence, correct


def is_small(logits: Sequence[Tensor]) -> bool:
    """Whether these are of one form, and calls cost more than what they do."""
    first = logits[0]
    return len(logits) * first.numel() <= _SMALL and all(
        rows.shape == first.shape and rows.dtype == first.dtype for rows in logits
    )


def _of_exit(
    rows: Tensor,
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    class_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, confidence and correctness [N]."""
    soft = target.is_floating_point()
    classes = target.argmax(1) if soft else target
    num_classes = rows.shape[1]
    if ignore_index is not None:  # cut off, so that a gradient is 0 and not 0·NaN
        rows = counted(rows, classes, ignore_index, rows.detach())
    dtype = torch.promote_types(rows.dtype, torch.float32)
    log_probabilities = _log_softmax(rows, dtype)
    best, prediction = log_probabilities.detach().max(1)
    weighted = log_probabilities
    if class_weight is not None:
        weighted = weighted * class_weight.to(dtype)
    if soft:
        q = (1 - label_smoothing) * target.to(dtype) + label_smoothing / num_classes
        # 0·log 0 = 0: what is impossible in the target may be so in the logits.
        loss = -torch.where(q == 0, 0, q * weighted).sum(1)
    else:
        index = counted(classes, classes, ignore_index, 0)
        loss = F.nll_loss(weighted, index, reduction="none")
        if label_smoothing:
            uniform = -weighted.sum(1) / num_classes
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    # Where a row is no number, or infinite, so is the best: there is no prediction.
    correct = (prediction == classes) & (best <= 0)
    if ignore_index is None:
        return loss, best.exp(), correct
    return (
        counted(loss, classes, ignore_index),
        best.exp(),
        counted(correct, classes, ignore_index, False),
    )


def _log_softmax(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each row, down the columns of many that are short: that takes PyTorch a tenth of the time.

    Rows that do not fill a vector it goes through number by number, on the CPU.
    """
    short = rows.shape[1] * dtype.itemsize < _VECTOR and rows.device.type == "cpu"
    if short and len(rows) >= _MANY and not torch.compiler.is_compiling():
        return rows.t().log_softmax(0, dtype).t()
    return rows.log_softmax(1, dtype)


def derivative(
    rows: Tensor,
    target: Tensor,
    ignore_index: int | None,
    label_smoothing: float,
    *,
    are_exponentials: bool = False,
) -> Tensor:
    """∂l/∂z = p − q of each row [N, C], differentiable itself; 0 where the target is ignored.

    The rows are logits, or exp(z − m) for any constants m.
    """
    if ignore_index is not None:
        rows = counted(rows, target, ignore_index, rows.detach())
    if are_exponentials:
        p = rows / rows.sum(1, keepdim=True)
    else:
        p = rows.softmax(1, torch.promote_types(rows.dtype, torch.float32))
    is_target = torch.arange(p.shape[1], device=p.device) == target.unsqueeze(1)
    q = (1 - label_smoothing) * is_target.to(p.dtype) + label_smoothing / p.shape[1]
    return counted(p - q, target, ignore_index)


def counted(
    rows: Tensor, target: Tensor, ignore_index: int | None, otherwise: Tensor | float | bool = 0.0
) -> Tensor:
    """Rows [N, ...] where the target counts; it takes more than a factor of 0 to undo a NaN."""
    if ignore_index is None:
        return rows
    valid = (target != ignore_index).view(-1, *(1,) * (rows.dim() - 1))
    return torch.where(valid, rows, otherwise)
