"""What "good" means: the meta loss, by which the updated model judges the weights."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reweight._ranks.collectives import gather_rows, sum_over_ranks
from reweight.budget import allot, exit_shares
from reweight.losses import ExitLosses


class MetaLoss(NamedTuple):
    """The meta loss and the samples it rests on.

    Attributes:
        value: L_meta, a scalar with a graph; within a distributed step this rank's part, and the
            parts of all ranks add up to it.
        shares: share of the meta samples, of all ranks, that each exit was judged on, shape [K],
            without a graph.
    """

    value: Tensor
    shares: Tensor


class Objective(Protocol):
    """Judges the updated model by its losses on the meta batch."""

    def __call__(self, meta: ExitLosses) -> MetaLoss:
        """L_meta of the losses [B, K] at the updated parameters."""


def require_meta_loss(result: object) -> MetaLoss:
    """What an objective returned, or an error that says what it should have."""
    if not isinstance(result, MetaLoss):
        raise TypeError(
            f"`objective` must return MetaLoss(value, shares), got {type(result).__name__}."
        )
    return result


@dataclass(frozen=True)
class MeanObjective:
    """L_meta = Σ_k mean_j l[j,k]: every exit is judged on every meta sample.

    Example:
        >>> MeanObjective()(ExitLosses(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))).value
        tensor(5.)
    """

    def __call__(self, meta: ExitLosses) -> MetaLoss:
        """See :class:`Objective`."""
        value = meta.mean_over_samples(meta.losses).sum()
        return MetaLoss(value, meta.losses.new_ones(meta.losses.shape[1]))


@dataclass(frozen=True)
class BudgetedObjective:
    """L_meta = Σ_k mean_{j in S_k} l[j,k]: each exit is judged on the samples it will answer.

    The sets S_k come from :func:`reweight.budget.allot` on the confidences of the *updated* model,
    with shares q_k ∝ p^k. Every exit's mean counts equally; an empty S_k adds nothing
    (Han, Pu et al., ECCV 2022).

    Args:
        power: p > 0 of the shares. Default 0.75, as published for CIFAR; 1 makes them equal.
        per_rank: let each rank of a distributed step allot its own meta samples, instead of all of
            them together; S_k is what the ranks have allotted to exit k. Default False.

    Raises:
        ValueError: the power is out of range.

    Example:
        >>> losses = ExitLosses(torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        ...                     confidence=torch.tensor([[0.5, 0.5], [0.9, 0.9]]))
        >>> BudgetedObjective(power=1.0)(losses).value  # exit 1 judged on sample 2, exit 2 on 1
        tensor(5.)
    """

    power: float = 0.75
    per_rank: bool = False

    def __post_init__(self) -> None:
        exit_shares(1, self.power)

    def __call__(self, meta: ExitLosses) -> MetaLoss:
        """See :class:`Objective`. Raises ValueError where there are no confidences."""
        if meta.confidence is None:
            raise ValueError(
                "`loss` must return ExitLosses with confidences for BudgetedObjective, which "
                "allots samples by them; got losses only. Return them, or use MeanObjective()."
            )
        confidence, counted, own = meta.confidence, meta.counted, slice(None)
        valid = None if counted is None else counted.any(1)
        if not self.per_rank:
            if valid is None:
                valid = torch.ones_like(confidence[:, 0], dtype=torch.bool)
            rows, own = gather_rows(torch.cat([confidence, valid.unsqueeze(1)], 1))
            confidence, valid = rows[:, :-1], rows[:, -1] > 0
        shares = exit_shares(meta.losses.shape[1], self.power)
        # From pageable memory this small copy is staged at once: it does not wait for the device.
        shares = shares.to(confidence.device, non_blocking=True)
        members = allot(confidence, shares, valid)[own]
        if counted is not None:
            members = members & counted
        counts = sum_over_ranks(members.sum(0).to(meta.losses.dtype))
        if meta.weight is None:
            sums = torch.where(members, meta.losses, 0).sum(0)
            value = (sums / counts.clamp(min=1)).sum()
        else:
            value = meta._replace(valid=members).mean_over_samples(meta.losses).sum()
        return MetaLoss(value, counts / counts.sum().clamp(min=1))
