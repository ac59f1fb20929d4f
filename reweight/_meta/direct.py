"""Direct weights in the place of a reweighter: nothing is learned, all is known of one batch."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from reweight._meta.learner import ReweighterLearner
from reweight._meta.predicted import PredictedLearner
from reweight._meta.problem import Hypergradient
from reweight.direct_weights import DirectWeights
from reweight.losses import ExitLosses
from reweight.objectives import MeanObjective
from reweight.result import Update


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
        return update._replace(undo=undo)

    @torch.no_grad()
    def weights(self, losses: ExitLosses, update: Update | None) -> Tensor:
        """By the hypergradient of this batch; 1 where there is none, or one that is not finite."""
        assert update is not None
        nothing = update.nonfinite.any()
        return self._checked(losses, torch.where(nothing, 0, update.hypergradient))


def learner_of(
    reweighter: torch.nn.Module,
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
