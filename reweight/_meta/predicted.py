"""Weights that are direct weights of a predicted hypergradient: what the prediction learns from."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from reweight._meta.learner import ReweighterLearner
from reweight._meta.problem import Hypergradient
from reweight._passes.forward import LossFunction
from reweight._ranks.collectives import sum_over_ranks
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.objectives import MeanObjective
from reweight.result import Update

Lesson = tuple[Tensor, Tensor, Tensor]
"""What was seen of each sample [B, F], what to predict of it, and how much it counts, [B, K]."""


class PredictedLearner(ReweighterLearner):
    """Regression on −∂L_meta/∂w, in units of its mean size in the batch at each exit.

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
        if given is exit_cross_entropy and self.reweighter.sees_probabilities:
            return partial(exit_cross_entropy, probabilities=True)
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
        size, share = sum_over_ranks(torch.stack([(shares * value.abs()).sum(0), shares.sum(0)]))
        seen = torch.where(known.any(1, keepdim=True), see(losses), 0)
        target = -value / torch.where(size > 0, size / share, 1)
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


_NUM_BATCHES = 10
