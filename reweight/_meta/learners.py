"""What learns from the hypergradient in other ways: direct weights, and a prediction of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from reweight._meta.learner import ReweighterLearner
from reweight._meta.problem import Hypergradient
from reweight._passes.forward import LossFunction
from reweight._ranks.collectives import sum_over_ranks
from reweight.direct_weights import DirectWeights
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.objectives import MeanObjective
from reweight.result import Update

_NUM_BATCHES = 10  # that are learned from again
Lesson = tuple[Tensor, Tensor, Tensor]
"""What was seen of each sample [B, F], what to predict of it, and how much it counts, [B, K]."""


class PredictedLearner(ReweighterLearner):
    """Regression on −∂L_meta/∂w less its mean over the batch, in units of what is left's mean size.

    The mean is of the step, not of a sample, and weights that average 1 cannot follow it. Left in,
    it is below 0 whenever the step is too long: most weights are then 0 until the next update, and
    the few others make steps of a rate that is for many.

    A step down the hypergradient moves the weights of a batch a little and is all that is made of
    it. As a target it is learned from as often as it takes: by ten steps of the optimizer, on the
    last ten batches that were judged. What one batch says is not of its samples alone, for it asks
    for more of whatever the model is short of now; over several that comes to nothing.
    """

    default_objective = MeanObjective
    num_steps = 10
    lessons: tuple[Lesson, ...] = ()

    def loss(self, given: LossFunction) -> LossFunction:
        """See :class:`ReweighterLearner`."""
        whole: partial[Any] = given if isinstance(given, partial) else partial(given)
        if whole.func is exit_cross_entropy and self.reweighter.sees_probabilities:
            return partial(whole, probabilities=True)
        return given

    def learn(self, losses: ExitLosses, weights: Tensor, hypergradient: Hypergradient) -> Update:
        """See :class:`ReweighterLearner`; what is undone is not remembered."""
        lessons = self.lessons
        update = super().learn(losses, weights, hypergradient)

        def undo() -> None:
            update.undo()
            self.lessons = lessons

        return update._replace(undo=undo)

    def _descent(
        self, losses: ExitLosses, weights: Tensor, value: Tensor, ok: Tensor
    ) -> Callable[[], None]:
        """What adds the gradient of the mean squared error to ``.grad``: this rank's part."""
        lessons = (*self.lessons[1 - _NUM_BATCHES :], self._lesson(losses, value, ok))
        self.lessons = lessons
        seen, target, shares = (torch.cat(parts) for parts in zip(*lessons, strict=True))
        network = cast(nn.Module, self.reweighter.network)

        def descend() -> None:
            errors = shares * (network(seen) - target).square()
            (errors.sum(0).mean() / len(lessons)).backward()

        return descend

    @torch.no_grad()
    def _lesson(self, losses: ExitLosses, value: Tensor, ok: Tensor) -> Lesson:
        see = cast("Callable[[ExitLosses], Tensor]", self.reweighter.seen)
        # Rows that train_fraction leaves out have a derivative of 0, and tell nothing.
        known = ok & (value != 0)
        shares = known * losses.sample_shares()
        value = torch.where(known, value, 0)
        total, share = sum_over_ranks(torch.stack([(shares * value).sum(0), shares.sum(0)]))
        share = torch.where(share > 0, share, 1)
        value = torch.where(known, value - total / share, 0)
        size = sum_over_ranks((shares * value.abs()).sum(0)) / share
        seen = torch.where(known.any(1, keepdim=True), see(losses), 0)
        target = -value / torch.where(size > 0, size, 1)
        return seen, target.to(seen), shares.to(seen)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`ReweighterLearner`; with the batches that are learned from."""
        return {**super().state_dict(), "lessons": [list(lesson) for lesson in self.lessons]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :class:`ReweighterLearner`."""
        super().load_state_dict(state_dict)
        device = next(self.reweighter.parameters()).device
        lessons = state_dict["lessons"]
        self.lessons = tuple(tuple(t.to(device) for t in lesson) for lesson in lessons)


class DirectLearner(ReweighterLearner):
    """The look-ahead begins at weights of 0, and what it finds are the weights of the step."""

    default_objective = MeanObjective
    begins_at_zero = True

    @property
    def is_trainable(self) -> bool:
        """Whether there is anything to find: at every call."""
        return True

    def ahead(self, losses: ExitLosses) -> Tensor:
        """No sample takes part in the step that is looked ahead to."""
        return torch.zeros_like(losses.losses, requires_grad=False)

    def learn(self, losses: ExitLosses, weights: Tensor, hypergradient: Hypergradient) -> Update:
        """Take note of the hypergradient."""
        update, _ = self._report(losses, hypergradient)
        counts = self.num_skipped, self.num_updates

        def undo() -> None:
            self.num_skipped, self.num_updates = counts

        self._count(update.nonfinite)
        return update._replace(nonfinite=F.pad(update.nonfinite, (0, 1)), undo=undo)

    @torch.no_grad()
    def weights(self, losses: ExitLosses, update: Update | None) -> Tensor:
        """By the hypergradient of this batch; 1 where there is none, or one that is not finite."""
        assert update is not None
        nothing = update.nonfinite.any()
        return self._checked(losses, torch.where(nothing, 0, update.hypergradient))


def learner_of(
    reweighter: nn.Module,
    optimizer: Optimizer | None,
    interval: int,
    clip_hypergradient: float | None,
    *,
    lagged: bool,
) -> ReweighterLearner:
    """What learns such a reweighter.

    Raises:
        ValueError: direct weights are to be found at some of the batches alone, or after the step
            that they are of, or by something that is for networks.
    """
    if not isinstance(reweighter, DirectWeights):
        predicted = getattr(reweighter, "form", None) == "predicted"
        kind = PredictedLearner if predicted else ReweighterLearner
        return kind(reweighter, optimizer, interval, clip_hypergradient)
    for name, given, why in (
        ("lagged=True", lagged, "a step that is judged when it has been taken has its weights"),
        ("`interval`", interval != 1, "a batch that is not judged has no weights of its own"),
        ("`reweighter_optimizer`", optimizer is not None, "there are no parameters to move"),
        ("`clip_hypergradient`", clip_hypergradient is not None, "its size cancels in the weights"),
    ):
        if given:
            raise ValueError(
                f"{name} must be left out with DirectWeights: {why}. Or take a SampleReweighter, "
                "which learns a rule for all batches."
            )
    return DirectLearner(reweighter, None, 1, None)
