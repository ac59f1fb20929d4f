"""Weights that are no function of the sample: what the hypergradient itself says of it."""

import torch
from torch import Tensor, nn

from reweight._checks import check_whole
from reweight._ranks.collectives import gather, sum_over_ranks
from reweight.losses import ExitLosses


class DirectWeights(nn.Module):
    """Weights w = max(0, −∂L_meta/∂w) of every batch anew, from w = 0: no network, nothing to tune.

    How far the meta loss falls when the next step begins to take a sample in (L2RW, Ren et al.,
    ICML 2018). It takes the place of a :class:`SampleReweighter` where that has no time to learn,
    on small data, and where the losses tell nothing of a wrong label. For clean meta data: what is
    known of a sample is what one meta batch says, and the weights of every batch need an update.

    The weights of each exit average 1 over the samples, of all ranks, with two exceptions. A few
    samples that have all the weight of a batch are a batch of a few samples, at a learning rate for
    many; that is bounded, so that the mean square of the weights is at most 4::

        p = max(0, −∂L_meta/∂w)        w = p / max(mean(p), ½·√mean(p²))

    Where the effective share of the batch, mean(p)²/mean(p²), is below a quarter, the mean falls
    with its square root, as learning rates do. And where the derivative is 0 nothing is known (rows
    that ``train_fraction`` leaves out, a cold Adam): the weight is 1, and no part of the mean.

    Args:
        num_exits: the number of exits, K. The default meta loss is then ``MeanObjective()``.

    Example:
        >>> weights = DirectWeights(num_exits=1)
        >>> hypergradient = torch.tensor([[-3.0], [2.0], [-1.0], [0.0]])
        >>> weights(torch.rand(4, 1), hypergradient).flatten()
        tensor([2.2500, 0.0000, 0.7500, 1.0000])
    """

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        check_whole("num_exits", num_exits)
        self.num_exits = num_exits

    def forward(self, losses: ExitLosses | Tensor, hypergradient: Tensor | None = None) -> Tensor:
        """Weights of every sample at every exit.

        Args:
            losses: of the batch, shape [B, K].
            hypergradient: ∂L_meta/∂w at w = 0, shape [B, K]. Default None: nothing is known.

        Returns:
            Shape [B, K], the dtype of the losses.

        Raises:
            ValueError: another number of exits.
        """
        exit_losses = losses if isinstance(losses, ExitLosses) else ExitLosses(losses)
        values = exit_losses.losses
        if values.dim() != 2 or values.shape[1] != self.num_exits:
            raise ValueError(
                f"`losses` must have shape [samples, num_exits={self.num_exits}], got "
                f"{list(values.shape)}. Build DirectWeights with as many exits as the model has."
            )
        if hypergradient is None:
            return torch.ones_like(values, requires_grad=False)
        # ∂L_meta/∂w has the share of the sample in the mean as a factor, an own weight for example.
        shares = exit_losses.sample_shares().expand_as(values)
        known = (hypergradient != 0) & (shares > 0)
        positive = torch.where(known, -hypergradient / shares, 0).clamp(min=0)
        # By the largest, for hypergradients go with the learning rate and their squares underflow.
        largest = gather(positive.amax(0)).amax(0)
        positive = positive / torch.where(largest > 0, largest, 1)
        parts = [known.to(values), positive, positive.square()]
        share, total, squares = sum_over_ranks(torch.stack([(shares * x).sum(0) for x in parts]))
        share = torch.where(share > 0, share, 1)
        weights = positive / bounded_scale(total / share, squares / share)
        return torch.where(known, weights, 1).to(values)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"num_exits={self.num_exits}"


def bounded_scale(mean: Tensor, mean_square: Tensor) -> Tensor:
    """What to divide positive weights by: their mean, or more where few have all; 1 for zeros."""
    scale = torch.maximum(mean, _SHARE**0.5 * mean_square.sqrt())
    return torch.where(scale > 0, scale, 1)


_SHARE = 1 / 4  # of a batch: below it the step of few samples is kept small
