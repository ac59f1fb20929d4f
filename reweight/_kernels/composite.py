"""Cross-entropy in plain differentiable operations: the reference, and what compilers fuse.

With z a row of logits, q its target distribution (class weights and smoothing included), s = Σ q
and p = softmax(z)::

    l = −⟨q, log p⟩          ∂l/∂z = s·p − q
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    losses, confidences, corrects = [], [], []
    soft = target.is_floating_point()
    classes = target.argmax(1) if soft else target
    index = counted(classes, classes, ignore_index, 0)
    for rows in logits:
        num_classes = rows.shape[1]
        if ignore_index is not None:  # cut off, so that a gradient is 0 and not 0·NaN
            rows = counted(rows, classes, ignore_index, rows.detach())
        dtype = torch.promote_types(rows.dtype, torch.float32)
        log_probabilities = rows.log_softmax(1, dtype)
        best, prediction = log_probabilities.detach().max(1)
        weighted = log_probabilities
        if class_weight is not None:
            weighted = weighted * class_weight.to(dtype)
        if soft:
            q = (1 - label_smoothing) * target.to(dtype) + label_smoothing / num_classes
            # 0·log 0 = 0: what is impossible in the target may be so in the logits.
            loss = -torch.where(q == 0, 0, q * weighted).sum(1)
        else:
            loss = -weighted.gather(1, index.unsqueeze(1)).squeeze(1)
            if label_smoothing:
                uniform = -weighted.sum(1) / num_classes
                loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        losses.append(counted(loss, classes, ignore_index))
        confidences.append(best.exp())
        correct = (prediction == classes) & best.isfinite()
        corrects.append(counted(correct, classes, ignore_index, False))
    return torch.stack(losses, 1), torch.stack(confidences, 1), torch.stack(corrects, 1)


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
