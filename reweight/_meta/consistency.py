"""⟨v, ∇L_tr⟩ is known twice: as Σ w·∂L_meta/∂w, and from the gradient that the backward gave.

What sets them apart is what an estimator does not see of the user's backward. Two sums at every
update tell, and nothing waits for the device: what they came to is read at the next update.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reweight._meta.problem import Known, MetaProblem, relative_difference
from reweight._optimizers.accepted import Parameters
from reweight._optimizers.entries import joined, together
from reweight._passes.differences import DifferenceWatch
from reweight._passes.ladder import Ladder
from reweight._ranks.collectives import local, num_ranks, sum_over_ranks
from reweight._ranks.shards import num_copies


@torch.no_grad()
def both_ways(problem: MetaProblem, known: Known, direction: Parameters, value: Tensor) -> Tensor:
    """This rank's part of what sets both sums apart, and of the size of their terms, shape [2].

    Args:
        problem: of this step.
        known: w, and the gradient that comes of it.
        direction: v, by name.
        value: ∂L_meta/∂w, shape [B, K].
    """
    value = value.to(torch.promote_types(value.dtype, torch.float32))  # sums of many
    # Of v and gradient, by share and device.
    pairs, ranks = defaultdict[Any, list[tuple[Tensor, Tensor]]](list), num_ranks()
    for name, tangent in direction.items():
        # A parameter that only another rank's losses reach has no gradient of its own here.
        gradient = known.gradients.get(name)
        if gradient is None:
            continue
        share = 1 / (num_copies(tangent) or ranks)
        pairs[share, tangent.device].append((local(tangent), local(gradient)))
        if name in known.accumulated:  # which is no part of the gradient of L_tr
            before = problem.unscaled(known.accumulated[name])
            pairs[-share, tangent.device].append((local(tangent), local(before)))
    dots, lengths = list[Tensor](), (list[Tensor](), list[Tensor]())
    for (share, _), each in pairs.items():
        for dot, *of_both in _groups(each):
            dots.append(dot.to(value) if share == 1 else share * dot.to(value))
            for length, found in zip(of_both, lengths, strict=True):
                found.append(length.to(value))
    for found in (dots, *lengths):
        found += [] if found else [value.new_zeros(())]
    terms, factors = known.weights * value, (problem.first.sample_shares * known.weights).to(value)
    all_of_it, loss, size = torch._foreach_norm(
        [factors, factors * problem.first.losses.losses, terms], 1
    )
    # Where a batch is known by heart its loss and gradient are the rounding of 1 − 1. Where v is
    # large the gradient may be small, as at Adam's first step, and all rounding.
    by_heart, precision = 8 * problem.precision ** (2 / 3), problem.precision
    both = _norm(lengths[0]) * _norm(lengths[1])
    all_of_it, rounding = torch._foreach_mul([all_of_it, both], [by_heart, precision ** (1 / 3)])
    doubt = all_of_it / loss.clamp(min=torch.finfo(value.dtype).tiny)
    sizes = [size * doubt.clamp(1, by_heart / precision), _norm(dots, 1), rounding]
    difference = terms.sum() - (dots[0] if len(dots) == 1 else sum(dots))
    return torch.stack([difference, _norm(sizes, torch.inf)])


def _groups(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """⟨a, b⟩ and the lengths of both, of all small ones as if they were one."""
    columns = list(zip(*pairs, strict=True))
    for group in together(columns[0]):
        a, b = (joined([kept[i] for i in group]).reshape(-1) for kept in columns)
        yield torch.dot(a, b), *torch._foreach_norm([a, b])


def _norm(numbers: list[Tensor], order: float = 2) -> Tensor:
    """Of some numbers; of one it is the number, whose sign says nothing here."""
    return (
        numbers[0] if len(numbers) == 1 else torch.linalg.vector_norm(torch.stack(numbers), order)
    )


SEVERAL = 3  # updates that fail
_ENOUGH = 10  # that pass, one after the other


class Check:
    """Whether both ways agree, at every update.

    Rounding of either way is far below the cubic root of the precision, which is the tolerance;
    that of finite differences is larger, for the kinks of ReLU and the like.

    Args:
        ladder: what is known of the operations of the model.
        is_coarse: whether the estimator is finite differences.

    Attributes:
        failures: in how many updates they did not, until ten in a row did.
        is_first: whether the next is to be looked at, whatever the one before came to.
    """

    def __init__(self, ladder: Ladder, *, is_coarse: bool) -> None:
        self.is_coarse, self.failures, self._ladder = is_coarse, 0, ladder
        self._num_passed, self._is_counted = 0, False  # in a row; whether the last one failed
        self._precision = 0.0  # of the numbers inside the model, where they are coarser
        self._expected: tuple[Later, float] | None = None
        self.is_first = True

    def expect(self, difference: Tensor | None, precision: float) -> None:
        """Take note of what an update came to, to look at in the next one."""
        if difference is not None:
            self._expected = Later(difference), self._tolerance(precision)

    def __call__(
        self,
        problem: MetaProblem,
        parts: Tensor,
        names: list[str],
        parts_of: Callable[[list[str]], Tensor],
    ) -> bool:
        """Warn if both ways differ, and say where; nothing waits unless the last update did too.

        Args:
            problem: of this update.
            parts: what :func:`both_ways` gives for it.
            names: of all parameters that v is of.
            parts_of: the same for v of some parameters alone; takes a pass.

        Returns:
            Whether they differ here, or did in the last update.
        """
        expected, self._expected = self._expected, None
        last = 0.0 if expected is None else expected[0].read()
        has_failed = expected is not None and last > expected[1]
        look = has_failed or (self.is_first and num_ranks() == 1)  # ranks would have to send
        self.is_first = False
        here = self.difference(problem, parts) if look else None
        has_failed, self._is_counted = has_failed and not self._is_counted, here is not None
        if here is None and has_failed:  # in every other update perhaps
            self._look_inside(problem)
            has_failed = last > self._tolerance(problem.precision)
        if here is None and not has_failed:
            self._num_passed += 1
            self.failures = 0 if self._num_passed == _ENOUGH else self.failures
            return False
        self.failures, self._num_passed = self.failures + 1, 0
        if here is not None and self.failures == 1:
            blamed = blame(names, lambda some: self.difference(problem, parts_of(some)) is not None)
            _warn(here, f" through {', '.join(blamed)}" if blamed else "")
        elif here is None and self.failures == SEVERAL:
            _warn(last, " in some updates")
        return True

    def difference(self, problem: MetaProblem, parts: Tensor) -> float | None:
        """The relative difference of all ranks, None within the tolerance; waits for them."""
        found = Later(relative_difference(sum_over_ranks(parts))).read()
        if not found > self._tolerance(problem.precision):
            return None
        self._look_inside(problem)
        return found if found > self._tolerance(problem.precision) else None

    def _look_inside(self, problem: MetaProblem) -> None:
        """At the precision of the numbers, for there may be autocast inside the model."""
        watch = DifferenceWatch(self._ladder)
        self._ladder.run(lambda: problem.replay({}, {}, watch, self._ladder.needs_graph))
        self._precision = watch.precision

    def _tolerance(self, precision: float) -> float:
        root: float = max(precision, self._precision) ** (1 / 3)
        return min(20 * root, 0.5) if self.is_coarse else root


def _warn(difference: float, where: str) -> None:
    warnings.warn(
        "Hypergradients do not agree with the backward of the model: it is not the derivative "
        f"of the forward, by {difference:.2g} of what the weights do{where}. Does a hook of a "
        "module or an activation change gradients, or one of a parameter other than by a mask "
        "or factor, or a custom autograd.Function, or does the forward differ when it is run "
        "again? Write a scaled gradient as x*s + (x*(1-s)).detach(), or use "
        "estimator='unrolled'.",
        stacklevel=3,
    )


def blame(
    names: list[str], differs: Callable[[list[str]], bool], most: int = 3, passes: int = 12
) -> list[str]:
    """Parameters that the difference comes from, by halves; each look takes a pass.

    Args:
        names: of all of them; together they differ.
        differs: whether both ways differ when v is taken of these parameters alone.
        most: how many are named.
        passes: how many are taken.
    """
    found: list[str] = []
    suspects = [names]
    while suspects and len(found) < most and passes > 0:
        group = suspects.pop()
        if len(group) == 1:
            found += group
            continue
        for half in (group[len(group) // 2 :], group[: len(group) // 2]):
            passes -= 1
            if differs(half):
                suspects.append(half)
    return found


class Later:
    """A number that the device is still to compute, for the host.

    Args:
        number: scalar.
    """

    def __init__(self, number: Tensor) -> None:
        self._copy = number.to("cpu", non_blocking=True)
        self._event = None
        if number.device.type != "cpu":
            self._event = torch.Event(number.device)
            self._event.record()

    def read(self) -> float:
        """The number; waits for no more than its own computation."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._copy.numpy())  # which says that it is on the host, unlike item()
