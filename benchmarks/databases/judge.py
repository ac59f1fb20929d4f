"""Is the hypergradient of a step right? One training set-up, held to an oracle."""

import logging
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from databases.oracles import (
    NUM_SAMPLES,
    Build,
    Expected,
    Training,
    by_rows,
    dense,
    norm,
    some_weights,
)
from reweight import MeanObjective, MetaReweightStep

BAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""The relative error up to which a hypergradient is exact; up to 100 times as much is inexact."""

WRONG, UNFINISHED, REFUSED, WARNED, DIFFERENCES, INEXACT, EXACT, NOT_APPLICABLE = OUTCOMES = (
    "wrong",
    "unfinished",
    "refused",
    "warned",
    "finite differences",
    "inexact",
    "exact",
    "not applicable",
)
"""The worst first."""


@dataclass
class Finding:
    """What came of a case.

    Attributes:
        outcome: one of ``OUTCOMES``.
        case: its name.
        how: by which estimator, and how operations without a forward rule got their tangents.
        error: of the hypergradient, relative.
        gradient_error: of ``.grad``, relative.
        double_backward: error of the package's own double backward, or why there is none.
        reason: why it was refused, is not applicable, or was warned of.
    """

    outcome: str
    case: str
    how: str = ""
    error: float | None = None
    gradient_error: float | None = None
    double_backward: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One training set-up.

    Attributes:
        name: of the sample of its entry.
        build: makes it.
        oracle: says what is right in a precision, with these weights.
        bar: the relative error up to which it is exact, by precision.
    """

    name: str
    build: Build
    oracle: Callable[[Build, torch.dtype, Tensor], Expected] = by_rows
    bar: dict[torch.dtype, float] = field(default_factory=lambda: BAR)


def judge(case: Case, dtype: torch.dtype) -> Finding:
    """Hold the step to the oracle of the case."""

    def build(dtype: torch.dtype) -> Training:
        torch.manual_seed(0)
        training = case.build(dtype)
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # what the forwards draw
            seed(1)
        return training

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = some_weights(NUM_SAMPLES)
            expected = case.oracle(build, dtype, weights)
    except Exception as error:  # the entry itself cannot be trained, for whatever reason
        return Finding(NOT_APPLICABLE, case.name, reason=_told(error))
    if not expected.value.isfinite().all():
        return Finding(NOT_APPLICABLE, case.name, reason="values that are not finite")
    try:
        ours = _ours(build, dtype, weights, "auto")
    except Exception as error:
        return Finding(REFUSED, case.name, reason=_told(error))
    bar = case.bar[expected.precision]
    rounding = torch.finfo(expected.precision).eps / bar  # a number of about 1 is known no better
    finding = Finding(EXACT, case.name, how=ours.how, reason=ours.told)
    finding.error = relative(ours.value, expected.value, rounding * expected.scale)
    finding.gradient_error = _gradient_error(ours.gradients, expected.gradients, rounding)
    allowed = bar
    try:
        double = _ours(build, dtype, weights, "unrolled").value
        double_error = relative(double, expected.value, rounding * expected.scale)
        finding.double_backward = f"{double_error:.1e}"
        # An ill-conditioned function is rounded more, by double backward too.
        allowed = max(bar, min(2 * double_error, 100 * bar))
    except Exception as error:
        finding.double_backward = _told(error)
    if "finite_difference" in ours.how:
        finding.outcome = DIFFERENCES
    elif not (finding.error <= allowed and finding.gradient_error <= bar):
        inexact = max(finding.error, finding.gradient_error) <= 100 * bar
        finding.outcome = INEXACT if inexact else WARNED if ours.told else WRONG
    return finding


class _Step(NamedTuple):
    value: Tensor
    gradients: dict[str, Tensor]
    how: str
    told: str


class _Weights(nn.Module):
    """Weights that are parameters: their gradient is the hypergradient, which is kept."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())
        self.hypergradient: Tensor | None = None
        self.weights.register_hook(self._keep)

    def _keep(self, gradient: Tensor) -> None:
        self.hypergradient = gradient.clone()

    def forward(self, losses: Any) -> Tensor:
        return self.weights


def _ours(build: Build, dtype: torch.dtype, weights: Tensor, estimator: str) -> _Step:
    training = build(dtype)
    reweighter, heard = _Weights(weights.to(dtype)), _Log()
    logger = logging.getLogger("reweight")
    logger.addHandler(heard)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = MetaReweightStep(
                training.model,
                training.optimizer,
                reweighter,
                # The gradient is what is asked for; the weights stay.
                reweighter_optimizer=torch.optim.SGD(reweighter.parameters(), lr=0.0),
                objective=MeanObjective(),
                estimator=estimator,
                exits=training.exits,
            )
            result = step.backward(training.train, training.meta)
    finally:
        logger.removeHandler(heard)
    if result.hypergradient_norm == 0:  # and so no update
        reweighter.hypergradient = torch.zeros_like(reweighter.weights)
    if reweighter.hypergradient is None:
        raise ArithmeticError("the update was skipped for a value that is not finite")
    gradients = {
        n: dense(p.grad) for n, p in training.model.named_parameters() if p.grad is not None
    }
    own = [str(one.message) for one in caught if "ypergradients" in str(one.message)]
    ladder = [f"{name} {rung.value}" for name, rung in step._estimator.ladder.ways.items()]
    how = ", ".join([step.estimator, *ladder])
    told = "; ".join([*own, *(heard.lines if step.estimator == "finite_difference" else ())])
    return _Step(reweighter.hypergradient, gradients, how, told)


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def relative(found: Tensor | None, expected: Tensor, floor: float) -> float:
    """‖found − expected‖ over ‖expected‖, or over the floor where that is larger."""
    if found is None:
        found = torch.zeros_like(expected)
    difference = (found - expected).norm().item()
    return 0.0 if difference == 0 else difference / max(expected.norm().item(), floor, 1e-30)


def _gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor], floor: float) -> float:
    """Relative, of all parameters as a whole."""
    differences = [
        (found[name] if name in found else torch.zeros_like(gradient)) - gradient
        for name, gradient in expected.items()
    ]
    return norm(differences) / max(norm([*expected.values()]), floor)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
