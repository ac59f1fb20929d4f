"""Per-sample, per-exit losses: the matrix l[i,k] that everything else in the package is about."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Logits: TypeAlias = Tensor | Sequence[Tensor]
"""K tensors [*S, C], one tensor [K, *S, C], or for a single exit one tensor [*S, C].

S is the shape of the target: [B] for a classifier, [B, T] for a language model.
"""


class ExitLosses(NamedTuple):
    """What one look at the logits of every exit yields; B counts samples (or tokens).

    Attributes:
        losses: l[i,k], shape [B, K], float32 (float64 for float64 logits), with a graph.
        confidence: the largest softmax probability, shape [B, K], without a graph.
        correct: whether the most probable class is the target, shape [B, K], bool.
        valid: the samples that count, shape [B], bool; None stands for all of them.

    A loss function of your own that knows only the losses returns ``ExitLosses(losses)``, or just
    the tensor.
    """

    losses: Tensor
    confidence: Tensor | None = None
    correct: Tensor | None = None
    valid: Tensor | None = None

    def sample_shares(self) -> Tensor:
        """The share of each sample in ``mean_i``: 1/B, or 0 where a sample does not count.

        Returns:
            Shape [B, 1], the dtype of the losses. All zero if no sample counts.
        """
        if self.valid is None:
            num_samples = len(self.losses)
            return self.losses.new_full((num_samples, 1), 1 / num_samples)
        valid = self.valid.to(self.losses.dtype).unsqueeze(1)
        return valid / valid.sum().clamp(min=1)

    def mean_over_samples(self, values: Tensor) -> Tensor:
        """The mean of each column of values [B, K] over the samples that count, shape [K].

        What stands in the other rows does not matter, not even if it is infinite.
        """
        if self.valid is not None:
            values = torch.where(self.valid.unsqueeze(1), values, 0)
        return (self.sample_shares() * values).sum(0)


def exit_cross_entropy(
    logits: Logits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> ExitLosses:
    """Cross-entropy of every sample at every exit; confidence and correctness from the same pass.

    The losses equal ``torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits],
    dim=1)``, computed in float32 at least; every token of a [B, T] target is a sample of its own.

    Args:
        logits: K tensors [B, C_k] or [B, T, C_k]; one tensor [K, B, C] or [K, B, T, C]; or for a
            single exit one tensor [B, C] or [B, T, C].
        target: class indices, int64, shape [B] or [B, T].
        ignore_index: samples with this target have loss 0, are never correct, and are not
            ``valid``: they drop out of every mean.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, in [0, 1].
        class_weight: one weight per class, shape [C], multiplied into the losses.

    Returns:
        :class:`ExitLosses` with B·T samples where the target is [B, T].

    Raises:
        TypeError: the logits are neither a tensor nor a sequence of tensors, or the target is not
            int64.
        ValueError: shapes disagree, the batch is empty, or a target is out of range (checked on the
            CPU; on other devices PyTorch's own assertion reports it).

    Example:
        >>> early = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> late = torch.tensor([[4.0, 0.0], [0.0, -3.0]])
        >>> result = exit_cross_entropy([early, late], torch.tensor([0, 1]))
        >>> result.losses
        tensor([[0.1269, 0.0181],
                [0.3133, 3.0486]])
        >>> result.correct
        tensor([[ True,  True],
                [ True, False]])
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` must lie in [0, 1], got {label_smoothing}.")
    exits = _exits(logits, target)
    target = target.reshape(-1)
    valid = target != ignore_index
    losses, confidences, corrects = [], [], []
    for index, exit_logits in enumerate(exits):
        rows = exit_logits.reshape(len(target), -1)
        num_classes = rows.shape[1]
        _check_range(target, valid, num_classes, index)
        log_probabilities = rows.log_softmax(
            1, dtype=torch.promote_types(rows.dtype, torch.float32)
        )
        weight = None if class_weight is None else class_weight.to(log_probabilities)
        loss = F.nll_loss(
            log_probabilities, target, weight, ignore_index=ignore_index, reduction="none"
        )
        if label_smoothing:  # (1 - ε) l + (ε / C) Σ_c over all classes as if each were the target
            weighted = log_probabilities if weight is None else log_probabilities * weight
            uniform = torch.where(valid, -weighted.sum(1) / num_classes, 0)
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        best, prediction = log_probabilities.detach().max(1)
        losses.append(loss)
        confidences.append(best.exp())
        corrects.append(prediction == target)
    return ExitLosses(
        torch.stack(losses, 1), torch.stack(confidences, 1), torch.stack(corrects, 1), valid
    )


def _exits(logits: Logits, target: Tensor) -> list[Tensor]:
    """The logits of each exit, [*S, C_k], whatever form they came in."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = f"a tensor of {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"`target` must hold class indices as an int64 tensor, got {got}.")
    if target.numel() == 0:
        raise ValueError(f"`target` must hold at least one sample, got shape {list(target.shape)}.")
    if isinstance(logits, Tensor):
        exits = list(logits) if logits.dim() == target.dim() + 2 else [logits]
    elif isinstance(logits, Sequence) and logits and all(isinstance(z, Tensor) for z in logits):
        exits = list(logits)
    else:
        raise TypeError(
            "`logits` must be a tensor or a non-empty list or tuple of tensors, one for each exit, "
            f"got {type(logits).__name__}. Pass `exits=`, a function that takes the logits out of "
            "what the model returns."
        )
    for index, exit_logits in enumerate(exits):
        if exit_logits.shape[:-1] != target.shape or exit_logits.numel() == 0:
            raise ValueError(
                f"`logits` of exit {index} must have the shape of the target with the classes "
                f"last, {[*target.shape, 'C']}, got {list(exit_logits.shape)}."
            )
    return exits


def _check_range(target: Tensor, valid: Tensor, num_classes: int, index: int) -> None:
    if target.device.type != "cpu":  # looking would wait for the device
        return
    wrong = valid & ((target < 0) | (target >= num_classes))
    if wrong.any():
        raise ValueError(
            f"`target` must lie in 0..{num_classes - 1}, the classes of exit {index} "
            f"(or equal `ignore_index`), got {target[wrong][0].item()}."
        )
