"""The weight prediction network g: what a sample's K losses say about its K weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reweight._checks import check_choice, check_number, check_whole
from reweight._ranks.collectives import gather, sum_over_ranks
from reweight.direct_weights import bounded_scale
from reweight.losses import ExitLosses


class SampleReweighter(nn.Module):
    """Predicts the weights w = g(l) of every sample at every exit from its own losses.

    ``g`` is Linear–ReLU–Linear on the K losses of one sample, and one of three forms makes weights
    of its raw output. Weights average 1 over the dimension named by ``average_over``, but for those
    predicted where a few samples have all: see :class:`DirectWeights`::

        tanh       w = 1 + strength · (tanh(raw) − mean(tanh(raw)))
        sigmoid    w = sigmoid(raw) / mean(sigmoid(raw))
        predicted  w = p / max(mean(p), ½·√mean(p²)), p = max(0, 1 + raw)

    The first is that of Han, Pu et al. (ECCV 2022), made for multi-exit networks: weights stay near
    1, and above a strength of K/(2(K−1)) some can be negative (−0.28 at K = 5 and 0.8). The second
    is that of Meta-Weight-Net (Shu et al., NeurIPS 2019): weights are positive and can reach 0. The
    third is for wrong labels that the losses do not give away, as those of a similar class: by
    regression on the last ten batches that were judged g predicts how far −∂L_meta/∂w is above its
    mean over the batch, in units of its mean distance from it, and 1 more is made weights as
    :class:`DirectWeights` are made. It learns from the first update on, from labels and
    probabilities (``num_classes=C``); its meta loss is by default the mean.

    Args:
        num_exits: the number of exits, K.
        form: "tanh" (default for K > 1), "sigmoid" (default for K = 1), or "predicted".
        average_over: the mean that is 1: of each sample over the "exits" (default for tanh), of
            each exit over the "samples" of the batch (default otherwise), or over "both".
        strength: how far tanh weights can leave 1. Default 0.8, as published for CIFAR (0.3 for
            ImageNet, with the mean over both). 0 makes weights of every form 1, and nothing is
            learned: what to compare with.
        inputs: what g sees of a sample: its "losses" (default), "confidences" or "both".
        num_classes: C, for g to see the label too, one of C columns, or the probabilities of a soft
            target. Default: no label, as published.
        num_features: F, for g to see the features too, what ``features=`` of the step gives for
            each sample, [B, F]. Default: none; for "predicted" with ``num_classes`` they are what
            the exits hold probable, in the mean [B, C], which the step asks its loss for.
        num_hidden: width of the hidden layer. Default 500 for tanh, else 100, as published.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, or K = 1 with the mean over the exits, which would
            make every weight 1.

    Example:
        >>> reweighter = SampleReweighter(num_exits=3)
        >>> weights = reweighter(torch.rand(8, 3))
        >>> weights.shape
        torch.Size([8, 3])
        >>> torch.allclose(weights.mean(1), torch.ones(8))
        True
        >>> by_class = SampleReweighter(num_exits=2, form="sigmoid", num_classes=3)
        >>> by_class(ExitLosses(torch.rand(4, 2), labels=torch.tensor([0, 1, 2, 1]))).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        num_exits: int,
        *,
        form: Literal["tanh", "sigmoid", "predicted"] | None = None,
        average_over: Literal["exits", "samples", "both"] | None = None,
        strength: float | None = None,
        inputs: Literal["losses", "confidences", "both"] = "losses",
        num_classes: int | None = None,
        num_features: int | None = None,
        num_hidden: int | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_exits", num_exits)
        form = form or ("sigmoid" if num_exits == 1 else "tanh")
        check_choice("form", form, ("tanh", "sigmoid", "predicted"))
        average_over = average_over or ("exits" if form == "tanh" else "samples")
        check_choice("average_over", average_over, ("exits", "samples", "both"))
        check_choice("inputs", inputs, ("losses", "confidences", "both"))
        if num_exits == 1 and average_over == "exits":
            raise ValueError(
                "`average_over` must be 'samples' for a single exit: the mean over the exits would "
                "make every weight 1."
            )
        if strength and form != "tanh":
            raise ValueError(
                f"`strength` must be 0, for weights of 1, or left out of form={form!r}, got "
                f"{strength}: it is of tanh weights."
            )
        strength = 0.8 if strength is None else strength
        check_number("strength", strength)
        if strength < 0:
            raise ValueError(f"`strength` must be at least 0, got {strength}.")
        if num_hidden is None:
            num_hidden = 500 if form == "tanh" else 100
        self.sees_probabilities = form == "predicted" and bool(num_classes) and num_features is None
        if self.sees_probabilities:
            num_features = num_classes
        for name, number in (("num_classes", num_classes), ("num_features", num_features)):
            if number is not None:
                check_whole(name, number)
        check_whole("num_hidden", num_hidden)
        self.num_exits, self.form, self.average_over = num_exits, form, average_over
        self.strength, self.inputs = strength, inputs
        self.num_classes, self.num_features = num_classes, num_features
        num_seen = 2 * num_exits if inputs == "both" else num_exits
        self.network = nn.Sequential(
            nn.Linear(num_seen + (num_classes or 0) + (num_features or 0), num_hidden),
            nn.ReLU(),
            nn.Linear(num_hidden, num_exits),
        )
        if form == "predicted":  # nothing, at first: all weights are 1
            for parameter in self.network[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, losses: ExitLosses | Tensor) -> Tensor:
        """Weights of every sample at every exit. No gradient flows back into the losses.

        Args:
            losses: what ``exit_cross_entropy`` returns, or the losses alone, shape [B, K].

        Returns:
            Shape [B, K], the dtype of the losses, differentiable in the parameters of this module.
            Means over samples leave out those that are not valid. Within a distributed step they
            are over the samples of all ranks; called by yourself, over those given.

        Raises:
            ValueError: another number of exits, or no confidences, labels or features, or others,
                where the network wants them.
        """
        exit_losses = losses if isinstance(losses, ExitLosses) else ExitLosses(losses)
        raw: Tensor = self.network(self.seen(exit_losses)).to(exit_losses.losses)
        if self.form == "predicted":
            positive = (1 + raw).clamp(min=0)
            mean, squares = (self._mean(each, exit_losses) for each in (positive, positive**2))
            scale = bounded_scale(mean, squares)
            weights = torch.where(mean > 0, positive / scale, 1)
        elif self.form == "sigmoid":
            # Over the largest of those averaged, so that they never all underflow.
            logarithm = F.logsigmoid(raw)
            positive = (logarithm - self._largest(logarithm.detach(), exit_losses)).exp()
            mean = self._mean(positive, exit_losses)
            share = positive / mean.clamp(min=torch.finfo(raw.dtype).tiny)
            weights = torch.where(mean > 0, share, 1)  # no sample counts
        else:
            bounded = raw.tanh()
            below = self._mean(bounded, exit_losses) - bounded
            weights = torch.rsub(below, 1, alpha=self.strength)  # 1 − strength · below
        return weights if self.strength else torch.ones_like(weights)

    def seen(self, exit_losses: ExitLosses) -> Tensor:
        """What the network sees, a row for each sample."""
        losses, confidence = exit_losses.losses, exit_losses.confidence
        if losses.dim() != 2 or losses.shape[1] != self.num_exits:
            raise ValueError(
                f"`losses` must have shape [samples, num_exits={self.num_exits}], got "
                f"{list(losses.shape)}. Build SampleReweighter with as many exits as the model "
                "has, or let `loss` return a row for each sample and a column for each exit."
            )
        if self.inputs != "losses" and confidence is None:
            raise ValueError(
                f"`losses` must carry confidences for inputs={self.inputs!r}, got None. Pass what "
                "exit_cross_entropy returns."
            )
        columns: dict[str, list[Tensor | None]]
        columns = {"losses": [losses], "confidences": [confidence], "both": [losses, confidence]}
        chosen = columns[self.inputs] + [self._labels(exit_losses), self._features(exit_losses)]
        parameter, counted = next(self.network.parameters()), exit_losses.counted
        seen = [each.detach().to(parameter) for each in chosen if each is not None]
        if counted is not None:
            # What a sample that does not count came to may be no number, and 0 times that is none.
            of_exits, masked = len(columns[self.inputs]), ~counted
            seen[:of_exits] = [each.masked_fill(masked, 0) for each in seen[:of_exits]]
            if seen[of_exits:]:
                masked = masked.all(1, keepdim=True)
                seen[of_exits:] = [each.masked_fill(masked, 0) for each in seen[of_exits:]]
        return seen[0] if len(seen) == 1 else torch.cat(seen, 1)

    def _labels(self, exit_losses: ExitLosses) -> Tensor | None:
        """One column for each class, [B, C]; no class where a sample does not count."""
        labels = exit_losses.labels
        if self.num_classes is None:
            return None
        if labels is None:
            raise ValueError(
                f"`losses` must carry labels for num_classes={self.num_classes}, got None. Pass "
                "what exit_cross_entropy returns, or let `loss` return ExitLosses(losses, "
                "labels=target)."
            )
        if labels.is_floating_point():
            num_classes, right = labels.shape[-1], labels.shape[-1] == self.num_classes
        else:
            num_classes = 1 + int(labels.max()) if labels.device.type == "cpu" else 0
            right = num_classes <= self.num_classes
        if not right or len(labels) != len(exit_losses.losses):
            raise ValueError(
                f"`losses` must carry labels of num_classes={self.num_classes}, one for each of "
                f"{len(exit_losses.losses)} samples, got {num_classes} classes, "
                f"{list(labels.shape)}."
            )
        if labels.is_floating_point():
            return labels
        return labels.unsqueeze(1) == torch.arange(self.num_classes, device=labels.device)

    def _features(self, exit_losses: ExitLosses) -> Tensor | None:
        """[B, F], or None."""
        features, wanted = exit_losses.features, self.num_features
        if wanted is None and features is None:
            return None
        if wanted is None or features is None or features.shape[1:] != (wanted,):
            got = None if features is None else list(features.shape)
            raise ValueError(
                f"`losses` must carry features [samples, num_features={wanted}], got {got}. "
                + (
                    "Let `loss` call exit_cross_entropy with probabilities=True."
                    if self.sees_probabilities
                    else "Give the step `features=` and SampleReweighter their number, or neither."
                )
            )
        return features

    def _largest(self, values: Tensor, exit_losses: ExitLosses) -> Tensor:
        """The largest value of each mean's, in the shape of the mean; 0 where none counts."""
        if exit_losses.counted is not None and self._is_masked(exit_losses):
            values = values.masked_fill(~exit_losses.counted, -torch.inf)
        dims = {"exits": (1,), "samples": (0,), "both": (0, 1)}[self.average_over]
        largest = values.amax(dims, keepdim=True)
        if self.average_over != "exits":
            largest = gather(largest).amax(0)
        return torch.where(largest.isfinite(), largest, 0)

    def _mean(self, values: Tensor, exit_losses: ExitLosses) -> Tensor:
        """The mean over the exits [B, 1], over the valid samples [1, K], or over both [1, 1]."""
        counted = None
        if self.average_over != "exits":
            values = sum_over_ranks(exit_losses.mean_over_samples(values)).unsqueeze(0)
        elif self._is_masked(exit_losses):
            counted = exit_losses.counted
        if self.average_over != "samples":
            values = _row_mean(values, counted)
        return values

    def _is_masked(self, exit_losses: ExitLosses) -> bool:
        """Whether means leave anything out: of a whole row there is no mean over its exits."""
        valid = exit_losses.valid
        return valid is not None and (self.average_over != "exits" or valid.dim() == 2)

    def extra_repr(self) -> str:
        """The choices made, for ``print(reweighter)``."""
        text = (
            f"num_exits={self.num_exits}, form={self.form}, average_over={self.average_over}, "
            f"strength={self.strength}, inputs={self.inputs}"
        )
        for name in ("num_classes", "num_features"):
            number = getattr(self, name)
            text += "" if number is None else f", {name}={number}"
        return text


def _row_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of each row over what counts in it, [B, 1]; 0 where nothing does."""
    if counted is None:
        return values.mean(1, keepdim=True)
    number = counted.sum(1, keepdim=True).clamp(min=1)
    return torch.where(counted, values, 0).sum(1, keepdim=True) / number
