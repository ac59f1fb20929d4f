"""Meta-learned per-sample, per-exit loss weights for any PyTorch model and optimizer."""

from reweight.batches import balanced_split, swap_halves
from reweight.budget import (
    BudgetPoint,
    anytime_accuracy,
    budgeted_curve,
    choose_exits,
    find_thresholds,
)
from reweight.costs import exit_costs
from reweight.direct_weights import DirectWeights
from reweight.losses import ExitLosses, exit_cross_entropy, linear_exit_cross_entropy
from reweight.objectives import BudgetedObjective, MeanObjective, MetaLoss, exit_shares
from reweight.result import StepCheck, StepResult
from reweight.reweighter import SampleReweighter
from reweight.step import MetaReweightStep

__version__ = "0.1.0"

__all__ = [
    "BudgetPoint",
    "BudgetedObjective",
    "DirectWeights",
    "ExitLosses",
    "MeanObjective",
    "MetaLoss",
    "MetaReweightStep",
    "SampleReweighter",
    "StepCheck",
    "StepResult",
    "anytime_accuracy",
    "balanced_split",
    "budgeted_curve",
    "choose_exits",
    "exit_costs",
    "exit_cross_entropy",
    "exit_shares",
    "find_thresholds",
    "linear_exit_cross_entropy",
    "swap_halves",
]
