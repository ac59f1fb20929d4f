"""⟨v, ∇L_tr⟩ is known twice: as Σ w·∂L_meta/∂w, and from the gradient that the backward gave.

What sets them apart is what an estimator does not see of the user's backward. Two sums at every
update tell, and nothing waits for the device: what they came to is read at the next update.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from reweight._meta.problem import MetaProblem
from reweight._optimizers.accepted import Parameters
from reweight._ranks.collectives import gather, num_ranks
from reweight._ranks.shards import local, num_copies


def both_ways(
    problem: MetaProblem, gradients: Parameters, direction: Parameters, value: Tensor
) -> Tensor:
    """This rank's part of both sums and of the size of their terms, shape [3].

    Args:
        problem: its weights are w.
        gradients: what the optimizer's next step sees, by name.
        direction: v, by name.
        value: ∂L_meta/∂w, shape [B, K].
    """
    terms = (problem.weights * value).double()
    dots = torch.stack([_dot(problem, name, v, gradients[name]) for name, v in direction.items()])
    size = torch.maximum(terms.abs().sum(), dots.abs().sum())
    return torch.stack([terms.sum(), dots.sum(), size])


def relative_difference(parts: Tensor) -> Tensor:
    """That of the two sums, from the parts of all ranks, shape [R, 3]; 0 where both are 0."""
    forward, backward, size = parts.sum(0)
    return torch.where(size > 0, (forward - backward).abs() / size, 0)


def _dot(problem: MetaProblem, name: str, tangent: Tensor, gradient: Tensor) -> Tensor:
    """This rank's part of ⟨v, ∇L_tr⟩ for one parameter; what was accumulated before is no part."""
    part = num_copies(tangent) or num_ranks()
    found = _product(tangent, gradient)
    if name in problem.first.accumulated:
        accumulated = problem.unscaled(problem.first.accumulated[name])
        found = found - _product(tangent, accumulated)
    return found / part


def _product(one: Tensor, other: Tensor) -> Tensor:
    flat = local(one).reshape(-1), local(other).detach().reshape(-1)
    return torch.dot(*flat).double()


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


def of_all_ranks(parts: Tensor) -> float:
    """The relative difference at once, which waits for the device and for the other ranks."""
    return Later(relative_difference(gather(parts))).read()
