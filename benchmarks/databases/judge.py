"""Is the hypergradient of a step right? One training set-up is judged by two oracles.

Neither shares code with the package. :func:`by_rows` needs the plain backward and nothing else:
with SGD the update is θ̂ = θ − α·g, so that with c = ∇L_meta(θ̂) after a real step

    ∂L_meta/∂w[i,k] = −α/B · ⟨ c , ∇θ l[i,k] ⟩ ,

one backward for every loss. It is what *the user's backward* does, and exact for operations that
have no second derivative too. :func:`by_differences` takes any optimizer: central differences of
L_meta around its real step, one weight after the other.
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

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


NUM_SAMPLES = 3
"""Of every batch."""


class Training(NamedTuple):
    """What a user brings to a step.

    Attributes:
        model: called with the inputs; its outputs, by way of ``exits``, are logits [B, C].
        optimizer: any; for :func:`by_rows` SGD without momentum.
        train: inputs and target.
        meta: the same.
        exits: outputs → logits.
    """

    model: nn.Module
    optimizer: Optimizer
    train: tuple[Any, Tensor]
    meta: tuple[Any, Tensor]
    exits: Callable[[Any], Tensor] = lambda outputs: outputs

    def losses(self, batch: tuple[Any, Tensor]) -> Tensor:
        """Of a batch, shape [B, 1]."""
        inputs, target = batch
        outputs = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        return F.cross_entropy(self.exits(outputs), target, reduction="none").unsqueeze(1)


Build: TypeAlias = Callable[[torch.dtype], Training]
"""Makes one anew, always the same, but for the precision."""


class Expected(NamedTuple):
    """What is right.

    Attributes:
        value: the hypergradient, shape [B, 1].
        gradients: ``.grad`` by name, where it is known.
        scale: what a gradient that is off by 1 would change; times the precision it is the rounding
            of gradients of logits of about 1, and what is below that is 0.
        precision: of the forward, which may compute in float32 whatever it is given.
    """

    value: Tensor
    gradients: dict[str, Tensor]
    scale: float
    precision: torch.dtype


@dataclass
class Finding:
    """What came of a case.

    Attributes:
        outcome: one of ``OUTCOMES``.
        case: its name.
        how: by which estimator, and which operations took another rung of the ladder.
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


def some_weights(num_samples: int) -> Tensor:
    """Those of the step, between 0.5 and 1.5, shape [B, 1]."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(num_samples, 1, generator=generator, dtype=torch.float64) + 0.5


def by_rows(build: Build, dtype: torch.dtype, weights: Tensor) -> Expected:
    """One plain backward for every loss, and one real step of SGD."""
    training = build(dtype)
    (group,) = training.optimizer.param_groups
    with _Dtypes() as seen:
        losses = training.losses(training.train)
    parameters = dict(training.model.named_parameters())
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    rows = [
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        for loss in losses.flatten()
    ]
    weights = weights.to(losses)
    (weights * losses).mean(0).sum().backward()
    gradients = {n: _dense(p.grad) for n, p in parameters.items() if p.grad is not None}
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.losses(training.meta).mean(0).sum().backward()
    slopes, share = [], group["lr"] / len(rows)
    norms = [_norm([g for g in row if g is not None]) for row in rows]
    scale = share * (_norm([p.grad for p in trained if p.grad is not None]) + max(norms))
    for row in rows:
        products = [
            (_dense(p.grad) * _dense(g)).sum()
            for p, g in zip(trained, row, strict=True)
            if p.grad is not None and g is not None
        ]
        slopes.append(-share * sum(products, losses.new_zeros(())))
    if not gradients:
        raise ValueError("no parameter gets a gradient")
    value = torch.stack(slopes).view_as(weights).detach()
    coarsest = max(seen.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return Expected(value, gradients, scale, coarsest)


def by_differences(build: Build, dtype: torch.dtype, weights: Tensor) -> Expected:
    """Central differences of L_meta around a real step, of fourth order, always in float64."""

    def meta_loss(weights: Tensor) -> Tensor:
        training = build(torch.float64)

        def closure() -> Tensor:
            training.optimizer.zero_grad()
            loss = (weights * training.losses(training.train)).mean(0).sum()
            loss.backward()
            return loss

        closure()
        training.optimizer.step(closure)
        with torch.no_grad():
            return training.losses(training.meta).mean(0).sum()

    slopes, step = [], 1e-3
    for i in range(len(weights)):
        change = torch.zeros_like(weights)
        change[i] = step
        near = meta_loss(weights + change) - meta_loss(weights - change)
        far = meta_loss(weights + 2 * change) - meta_loss(weights - 2 * change)
        slopes.append((8 * near - far) / (12 * step))
    return Expected(torch.stack(slopes).view_as(weights), {}, 0.0, dtype)


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
        torch.manual_seed(1)  # what the forwards draw
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


class _Dtypes(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor) and one.requires_grad:
                self.dtypes.add(one.dtype.to_real())
        return result


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
            step.backward(training.train, training.meta)
    finally:
        logger.removeHandler(heard)
    if reweighter.hypergradient is None:
        raise ArithmeticError("the update was skipped for a value that is not finite")
    gradients = {
        n: _dense(p.grad) for n, p in training.model.named_parameters() if p.grad is not None
    }
    own = [str(one.message) for one in caught if "ypergradients are" in str(one.message)]
    told = "; ".join([*own, *heard.lines])
    return _Step(reweighter.hypergradient, gradients, step.estimator, told)


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
    return _norm(differences) / max(_norm([*expected.values()]), floor)


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(_dense(tensor).norm().item() ** 2 for tensor in tensors))


def _dense(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_sparse else tensor.clone()


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
