"""The next step of an optimizer of any class: recorded, and verified where it is used first."""

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, optim

from reweight._optimizers.accepted import why_not
from reweight._optimizers.recorded_step import USUAL, How, recorded_step
from reweight._optimizers.verification import kinds, verify
from reweight._ranks.collectives import local
from reweight._ranks.shards import shard_like


class _Verified(NamedTuple):
    kind: type[optim.Optimizer]
    kinds: frozenset[Any]
    how: How


_verified: WeakKeyDictionary[optim.Optimizer, _Verified] = WeakKeyDictionary()


def by_recording(
    optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], num_cut: Tensor
) -> dict[int, Tensor]:
    """θ̂ by the id of the parameter, of those that have a gradient.

    Args:
        optimizer: of any class.
        gradients: by the id of the parameter; None for none. Others keep the gradient they have.
        num_cut: a count, to which a backward adds the entries of its derivative that are not
            finite, and so taken as 0.

    Raises:
        TypeError: the step has no derivative, or cannot be recorded.
    """
    try:
        known = _verified.get(optimizer)
        found = frozenset(kinds(optimizer, gradients))
        if known is None or known.kind is not type(optimizer):
            known = _Verified(type(optimizer), frozenset(), USUAL)
        if not found <= known.kinds:
            how, moved_at_all = verify(optimizer, gradients)
            known = _Verified(known.kind, known.kinds | (found if moved_at_all else set()), how)
            _verified[optimizer] = known
        cut = _Cut(num_cut)
        moved = recorded_step(
            optimizer,
            {key: None if g is None else cut.of_gradient(g) for key, g in gradients.items()},
            known.how,
        ).parameters
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TypeError(why_not(optimizer, error)) from error
    return {key: cut.of_parameter(p, gradients[key]) for key, p in moved.items()}


class _Cut:
    """Takes entries of the derivative that are not finite as 0, and counts them.

    Not if what the derivative is asked for is not finite itself: that is for others to see.
    """

    def __init__(self, num_cut: Tensor) -> None:
        self._num_cut = num_cut
        self._is_finite = torch.ones_like(num_cut, dtype=torch.bool)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The same, with the derivative cut where it arrives."""
        if not gradient.requires_grad:
            return gradient
        gradient = gradient.view_as(gradient)
        counted = torch.zeros_like(self._num_cut)

        def cut(derivative: Tensor) -> Tensor:
            part = local(derivative)
            bad = ~part.isfinite() & self._is_finite.to(part.device)
            number = bad.sum().to(counted.device)
            self._num_cut += number - counted  # once, if a backward is run again
            counted.copy_(number)
            result: Tensor = shard_like(derivative, torch.where(bad, 0, part))
            return result

        gradient.register_hook(cut)
        return gradient

    def of_parameter(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """The same, with a look at what its derivative is asked for; it may be 0."""

        def look(cotangent: Tensor) -> None:
            self._is_finite = self._is_finite & local(cotangent).isfinite().all().to(
                self._is_finite.device
            )

        if gradient is None or not gradient.requires_grad:
            return parameter
        if not parameter.requires_grad:
            never = torch.zeros_like(gradient, dtype=torch.bool)
            parameter = torch.where(never, gradient, parameter)
        parameter.register_hook(look)
        return parameter
