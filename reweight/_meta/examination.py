"""What to know before a long run: steps taken on copies, looked at from all sides."""

import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reweight._optimizers.pseudo_update import way_of
from reweight._passes.snapshots import Beginning, Gradients
from reweight.batches import Batch, num_samples, rows_of, unpack
from reweight.losses import ExitLosses
from reweight.result import StepCheck, StepResult

_ROUNDS = 3


def examine(step: Any, train: Batch, meta: Batch) -> StepCheck:
    """Look at a step from all sides.

    Args:
        step: the :class:`MetaReweightStep`, of which copies are taken.
        train: inputs and target.
        meta: inputs and target.
    """
    train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
    lookahead = step._lookahead
    model, optimizers, exactness = lookahead.model, lookahead.optimizers, lookahead.exactness
    twin = _twin(step)
    with _said() as messages:
        result = twin.update_reweighter(train, meta)
    parts, signal = _halves(meta), None
    beginning = Beginning(model)
    gradients = Gradients(model.parameters(), copy=True)

    def plain() -> None:
        losses = step._forward(*train, beginning=beginning)
        lookahead.scaled(losses.mean_over_samples(losses.losses).sum()).backward()

    try:
        with _said():
            if parts is not None:
                results = [_twin(step).update_reweighter(train, part) for part in parts]
                signal = _agreement(result.losses, results)
            timed = _twin(step)
            timed._learner.interval = 1  # an update at every call
            runs = plain, lambda: timed.backward(train, meta)
            costs = [_cost(run, model, beginning) for run in runs]
    finally:
        beginning.restore()
        gradients.restore()
    seconds, memory = zip(*costs, strict=True)
    difference = result.backward_difference
    return StepCheck(
        estimator=twin.estimator,
        operations={name: way.value for name, way in twin._estimator.ladder.told.items()},
        optimizers=[f"{type(o).__name__}: {way_of(o, exactness)}" for o in optimizers],
        backward_difference=None if difference is None else float(difference),
        num_zero_moments=int(result.num_zero_moments),
        signal=signal,
        hooks=list(_hooks(model)),
        interval=step._learner.interval,
        seconds=seconds,
        memory=None if None in memory else memory,
        messages=list(dict.fromkeys(messages)),
    )


def _twin(step: Any) -> Any:
    """The same step at its beginning, with a reweighter of its own."""
    twin = copy.copy(step)
    twin._lookahead, twin._learner = copy.copy(step._lookahead), copy.deepcopy(step._learner)
    twin._learner.num_calls = 0
    twin._estimator = step._estimator.anew()
    return twin


@contextmanager
def _said() -> Iterator[list[str]]:
    """The warnings and what is logged, instead of showing them."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("reweight"), Handler(logging.WARNING)
    shown = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
        messages += [str(each.message) for each in caught]
    finally:
        logger.propagate = shown
        logger.removeHandler(handler)


def _halves(meta: Batch) -> list[Batch] | None:
    """Every other sample, and the rest; None where a batch cannot be parted."""
    try:
        rows = [slice(first, None, 2) for first in (0, 1)] if num_samples(meta) > 1 else []
        halves = [(rows_of(meta[0], half), rows_of(meta[1], half)) for half in rows]
    except (TypeError, ValueError):
        return None
    return halves or None


def _agreement(losses: ExitLosses, results: Sequence[StepResult]) -> float:
    """The correlation of what two meta batches ask of the same samples, of each exit's own mean."""
    found = []
    for result in results:
        value = result.hypergradient
        assert value is not None
        value = value.double() if losses.valid is None else value[losses.valid].double()
        found.append(value - value.mean(0))
    one, other = found
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-300))


def _cost(
    run: Callable[[], object], model: nn.Module, beginning: Beginning
) -> tuple[float, int | None]:
    """Seconds, the median of a few, and the most bytes above those before; None on a CPU."""
    device = next(model.parameters()).device
    card = torch.cuda if device.type == "cuda" else None
    found = []
    for _ in range(_ROUNDS + 1):  # the first warms up
        for parameter in model.parameters():
            parameter.grad = None
        if card is not None:
            card.synchronize(device)
            card.reset_peak_memory_stats(device)
        before, start = card.memory_allocated(device) if card else 0, time.perf_counter()
        run()
        if card is not None:
            card.synchronize(device)
        found.append(time.perf_counter() - start)
        beginning.restore()
    memory = card.max_memory_allocated(device) - before if card else None
    return statistics.median(found[1:]), memory


def _hooks(model: nn.Module) -> Iterator[str]:
    """Which parameters and modules have hooks that see, and may change, gradients."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            yield f"parameter {name}"
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            yield f"module {name or type(module).__name__}"
