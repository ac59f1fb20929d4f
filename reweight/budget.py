"""The inference side: which exit answers which sample, how accurately, and at what cost.

A sample leaves at the first exit whose confidence reaches that exit's threshold. Thresholds come
from a held-out split: exit k is given a share q_k of the samples (Huang et al., ICLR 2018).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reweight._checks import kind
from reweight.losses import ExitLosses
from reweight.objectives import exit_shares, quotas


def find_thresholds(confidence: Tensor, shares: Tensor) -> Tensor:
    """The confidence each exit asks for, so that it answers its share of a held-out split.

    The threshold of exit k is the confidence of the floor(n·q_k)-th most confident sample among
    those that no earlier exit took; the last exit takes all. A threshold cannot split equally
    confident samples. Where a tie makes an exit take more than its share, the later ones divide
    what is left in proportion to theirs; where it would leave them nothing, the exit stops short
    of the tie if that is nearer to its share. Confidences computed from float64 logits tie rarely.

    Args:
        confidence: shape [N, K], of samples the model was not trained on.
        shares: q_k, shape [K], as of :func:`exit_shares`.

    Returns:
        Shape [K], the dtype of the confidences; +inf for an exit that is to take none, -inf last.

    Raises:
        ValueError: there are no samples, or the numbers of exits differ.

    Example:
        >>> confidence = torch.tensor([[0.9, 0.9], [0.8, 0.5], [0.7, 0.6], [0.6, 0.9]])
        >>> find_thresholds(confidence, exit_shares(2, 1.0))
        tensor([0.8000,   -inf])
    """
    num_samples, num_exits = _check_matrix(confidence, "confidence")
    if shares.shape != (num_exits,):
        raise ValueError(f"`shares` must have shape [{num_exits}], got {list(shares.shape)}.")
    shares = shares.double()
    planned = quotas(shares, num_samples)
    thresholds = confidence.new_full((num_exits,), -torch.inf)
    left = confidence.masked_fill(confidence.isnan(), -torch.inf)  # as choose_exits has them
    for k in range(num_exits - 1):
        fair = quotas(shares[k] / shares[k:].sum().clamp(min=1e-300), len(left))
        quota = int(torch.minimum(planned[k], fair))
        if quota == 0:
            thresholds[k] = torch.inf
            continue
        ranked = left[:, k].sort(descending=True).values
        threshold = ranked[quota - 1]
        num_above, num_reached = int((ranked > threshold).sum()), int((ranked >= threshold).sum())
        if num_reached == len(left) and quota - num_above <= num_reached - quota:
            threshold = ranked[num_above - 1] if num_above else ranked.new_tensor(torch.inf)
        thresholds[k] = threshold
        left = left[left[:, k] < threshold]
    return thresholds


def choose_exits(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """The first exit whose confidence reaches its threshold, counted from 0; the last takes all.

    Args:
        confidence: shape [N, K].
        thresholds: shape [K]; the last is not looked at.

    Returns:
        Shape [N], int64.

    Raises:
        ValueError: the numbers of exits differ.
    """
    _check_matrix(confidence, "confidence")
    if thresholds.shape != confidence.shape[1:]:
        raise ValueError(
            f"`thresholds` must have shape {list(confidence.shape[1:])}, got "
            f"{list(thresholds.shape)}."
        )
    reached = confidence >= thresholds.to(confidence)
    reached[:, -1] = True
    return reached.int().argmax(1)


def anytime_accuracy(losses: ExitLosses) -> Tensor:
    """The accuracy of every exit on all samples that count.

    Args:
        losses: with correctness [N, K], as ``exit_cross_entropy`` gives them.

    Returns:
        Shape [K], float64.

    Raises:
        ValueError: there is no correctness, or no sample.
    """
    return _counted(losses, "correct", "losses").double().mean(0)


class BudgetPoint(NamedTuple):
    """One point of a budgeted curve.

    Attributes:
        power: p of the shares q_k ∝ p^k that the thresholds were found for.
        thresholds: the confidence each exit asks for, shape [K].
        accuracy: share of the test samples answered correctly.
        cost: mean cost of an answer, in the unit of the costs given.
        shares: share of the test samples that each exit answered, shape [K].
    """

    power: float
    thresholds: Tensor
    accuracy: float
    cost: float
    shares: Tensor


POWERS: tuple[float, ...] = tuple(i / 20 for i in range(1, 40))
"""The sweep of Huang et al. (ICLR 2018): p = 1/20 … 39/20."""


def budgeted_curve(
    calibration: ExitLosses,
    test: ExitLosses,
    costs: Sequence[float],
    powers: Sequence[float] = POWERS,
) -> list[BudgetPoint]:
    """Accuracy against mean cost, with thresholds from one split and the accuracy from another.

    Args:
        calibration: the held-out split; its confidences [N, K] give the thresholds.
        test: confidences and correctness [N', K] of the test split.
        costs: cost of an answer at each exit, everything before it included, length K.
        powers: the sweep over p of q_k ∝ p^k.

    Returns:
        One :class:`BudgetPoint` for each p, in the order given.

    Raises:
        ValueError: confidences or correctness are missing, or the numbers of exits differ.
    """
    held_out = _counted(calibration, "confidence", "calibration")
    confidence = _counted(test, "confidence", "test")
    correct = _counted(test, "correct", "test").double()
    num_exits = confidence.shape[1]
    if not len(costs) == num_exits == held_out.shape[1]:
        raise ValueError(
            f"`costs`, `calibration` and `test` must have the same number of exits, got "
            f"{len(costs)}, {held_out.shape[1]} and {num_exits}."
        )
    cost = torch.tensor(costs, dtype=torch.float64, device=confidence.device)
    points = []
    for power in powers:
        thresholds = find_thresholds(held_out, exit_shares(num_exits, power))
        exits = choose_exits(confidence, thresholds)
        accuracy = correct.gather(1, exits.unsqueeze(1)).mean().item()
        shares = exits.bincount(minlength=num_exits).double() / len(exits)
        points.append(BudgetPoint(power, thresholds, accuracy, cost[exits].mean().item(), shares))
    return points


def _counted(losses: ExitLosses, field: Literal["confidence", "correct"], name: str) -> Tensor:
    """Confidences or correctness of the samples that count, at every exit, [N, K]."""
    matrix = losses.confidence if field == "confidence" else losses.correct
    if matrix is None:
        raise ValueError(
            f"`{name}` must carry {field}, got None. Pass what exit_cross_entropy returns."
        )
    if losses.counted is not None:
        matrix = matrix[losses.counted.all(1)]
    _check_matrix(matrix, name)
    return matrix


def _check_matrix(matrix: Tensor, name: str) -> tuple[int, int]:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"`{name}` must be a tensor [samples, exits], got {kind(matrix)}.")
    if matrix.dim() != 2 or len(matrix) == 0:
        raise ValueError(
            f"`{name}` must have shape [samples, exits] and hold a sample, got "
            f"{list(matrix.shape)}."
        )
    return matrix.shape[0], matrix.shape[1]
