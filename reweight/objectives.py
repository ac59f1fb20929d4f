"""What "good" means: the meta loss, by which the updated model judges the weights."""

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reweight._checks import check_positive, check_whole
from reweight._ranks.collectives import gather_rows, num_ranks, sum_over_ranks
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

    The sets S_k come from :func:`reweight.objectives.allot` on the confidences of the *updated*
    model, with shares q_k ∝ p^k. Every exit's mean counts equally; an empty S_k adds nothing
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
        of_exits = meta.valid is not None and meta.valid.dim() == 2
        valid = counted.any(1) if counted is not None and of_exits else meta.valid
        if num_ranks() > 1 and not self.per_rank:
            if valid is None:
                valid = torch.ones_like(confidence[:, 0], dtype=torch.bool)
            rows, own = gather_rows(torch.cat([confidence, valid.unsqueeze(1)], 1))
            confidence, valid = rows[:, :-1], rows[:, -1] > 0
        shares = _exit_shares(meta.losses.shape[1], self.power, confidence.device)
        members = allot(confidence, shares, valid)[own]
        if counted is not None and of_exits:
            members = members & counted
        counts = sum_over_ranks(members.sum(0, dtype=meta.losses.dtype))
        if meta.weight is None:
            sums = meta.losses.masked_fill(~members, 0).sum(0)
            value = (sums / counts.clamp(min=1)).sum()
        else:
            value = meta._replace(valid=members).mean_over_samples(meta.losses).sum()
        return MetaLoss(value, counts / counts.sum().clamp(min=1))


def exit_shares(num_exits: int, power: float) -> Tensor:
    """The share q_k of the samples that each exit is to answer: q_k ∝ p^k, k = 1..K.

    Args:
        num_exits: K, at least 1.
        power: p > 0. Below 1 early exits answer more, at 1 all the same, above 1 late exits more.

    Returns:
        Shape [K], float64, adding up to 1.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.

    Example:
        >>> exit_shares(3, 0.5)
        tensor([0.5714, 0.2857, 0.1429], dtype=torch.float64)
    """
    check_whole("num_exits", num_exits)
    check_positive("power", power)
    return _exit_shares(num_exits, power, torch.device("cpu")).clone()


@functools.cache
def _exit_shares(num_exits: int, power: float, device: torch.device) -> Tensor:
    exponents = torch.arange(num_exits, dtype=torch.float64)
    # p^k / Σ p^j, with the largest term scaled to 1 so that no power overflows.
    powers = power ** (exponents if power <= 1 else exponents - (num_exits - 1))
    # From pageable memory this small copy is staged at once: it does not wait for the device.
    return (powers / powers.sum()).to(device, non_blocking=True)


def quotas(shares: Tensor, num_samples: Tensor | int) -> Tensor:
    """``floor(n·q_k)``, a product that is a whole number but for rounding counting as one."""
    return (shares * num_samples + 1e-9).floor()


def allot(confidence: Tensor, shares: Tensor, valid: Tensor | None = None) -> Tensor:
    """Allot each sample to one exit: exit k takes the most confident samples among those left.

    Exit 1 takes its floor(n·q_1) most confident samples, exit 2 its floor(n·q_2) most confident of
    the rest, and so on; the last exit takes what remains. Of equally confident samples the earlier
    in the batch goes first, so that saturated confidences starve no exit.

    Args:
        confidence: shape [B, K].
        shares: q_k, shape [K], adding up to 1.
        valid: the samples to allot, shape [B], bool; None for all. n counts these.

    Returns:
        Shape [B, K], bool: one True a row, none for a sample that is not valid.
    """
    num_samples, num_exits = confidence.shape
    left = confidence.clamp(min=torch.finfo(confidence.dtype).min)  # −∞ is of those that are gone
    if valid is not None:
        left.masked_fill_(~valid.unsqueeze(1), -torch.inf)
    quota = quotas(shares.to(confidence.device), num_samples if valid is None else valid.sum())
    is_within = torch.arange(num_samples, device=confidence.device) < quota.unsqueeze(1)
    members = torch.empty_like(is_within)
    for k in range(num_exits - 1):
        order = left[:, k].argsort(descending=True, stable=True)
        taken = members[k].scatter_(0, order, is_within[k])
        left.masked_fill_(taken.unsqueeze(1), -torch.inf)
    torch.ne(left[:, -1], -torch.inf, out=members[-1])
    return members.t()
