"""The hypergradient ∂L_meta/∂w: how the weights of a step change the loss after it.

θ is a constant of the meta step and L_tr = Σ_k mean_i w[i,k]·l[i,k] is linear in the weights, so
with c = ∇L_meta(θ̂) and v = (∂U/∂gradient)ᵀ c ::

    ∂L_meta/∂w[i,k] = mean's share of i · ⟨ v , ∇θ l[i,k] ⟩

for all i,k at once: one Jacobian–vector product of θ ↦ l. The identity is that of L2RW (Ren et al.,
ICML 2018) and Meta-Weight-Net; its forward-mode form that of EMLC (Taraday and Baskin, ICCV 2023).
"""

import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from reweight._checks import check_choice, noted
from reweight._meta.consistency import SEVERAL, Check, both_ways
from reweight._meta.problem import Hypergradient, Known, MetaProblem, dense, leaves
from reweight._optimizers.accepted import Parameters, PseudoUpdate
from reweight._passes.attention import PlainDropout, plain_attention
from reweight._passes.differences import DifferenceWatch, differ
from reweight._passes.forward_mode import load_forward_mode, tangents_follow_gradients
from reweight._passes.hooks import through_hooks
from reweight._passes.ladder import Ladder, NotCompiledError
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.snapshots import Beginning
from reweight._ranks.collectives import sums_over_ranks
from reweight._ranks.shards import sharded_modules, whole
from reweight.losses import ExitLosses
from reweight.objectives import MetaLoss

_logger = logging.getLogger("reweight")


def dual_product(problem: MetaProblem, tangents: Parameters, ladder: Ladder) -> Tensor:
    """⟨v, ∇θ l⟩ exactly, by one forward-mode pass; no second-order graph."""
    load_forward_mode()

    def product() -> Tensor:
        with forward_ad.dual_level():
            within = tangents_follow_gradients(problem.first.cache, ladder)
            losses = problem.replay({}, tangents, within, ladder.needs_graph)  # θ + ε·v
            value, tangent = forward_ad.unpack_dual(losses)
        # None where the losses move with nothing that the meta loss moves with.
        return torch.zeros_like(value) if tangent is None else tangent.detach()

    forward = problem.forward
    if forward.compiled is not None and not ladder.has_seen_uncompiled:
        compiled, forward.compiled = forward.compiled, None
        try:
            ladder.require_compilable(product)
        finally:
            forward.compiled = compiled
    return ladder.run(product)


def difference_product(
    problem: MetaProblem, tangents: Parameters, ladder: Ladder, remedy: str = ""
) -> Tensor:
    """⟨v, ∇θ l⟩ approximately, by two forwards at θ ± h·v; for what has no forward mode.

    h·‖v‖ is precision^⅔·‖θ‖, 2e-5 of ‖θ‖ in float32 and 0.04 in bfloat16: rounding, which grows as
    precision/h, is balanced against the kinks of ReLU and the like, of which about √h are passed
    (``benchmarks/finite_difference.py`` measures both). Wrong where the model cuts tensors from the
    graph: differences see through it, and the first time a warning says so, with a remedy.
    """
    lengths = [
        torch.stack([whole(tensor.detach().norm()) for tensor in tensors]).norm()
        for tensors in ([problem.first.moved[name] for name in tangents], tangents.values())
    ]
    watch = DifferenceWatch(ladder)

    def losses_at(distance: Tensor) -> Tensor:
        at = {n: problem.first.moved[n].detach() + distance * v for n, v in tangents.items()}
        with noted(
            lambda: (
                "Finite differences run the forward again, without a graph, where it failed. Use "
                "estimator='unrolled' if it needs one."
            )
        ):
            return ladder.run(lambda: problem.replay(at, {}, watch, ladder.needs_graph))

    def difference(precision: float) -> Tensor:
        step = precision ** (2 / 3) * lengths[0] / lengths[1]
        step = torch.where(step.isfinite() & (step > 0), step, 1)  # v = 0: any step gives 0
        above = losses_at(step).detach()
        cuts, watch.cuts = watch.cuts, []
        below = losses_at(-step).detach()
        look, ladder.has_looked_for_cuts = bool(cuts) and not ladder.has_looked_for_cuts, True
        if look and differ(cuts, watch.cuts):
            warnings.warn(
                "The model cuts tensors from the graph that depend on its parameters (detach or "
                "no_grad), which finite differences cannot see: hypergradients are wrong where the "
                f"cut matters. {remedy}",
                stacklevel=3,
            )
        watch.cuts = []
        return (above - below) / (2 * step)

    product = difference(problem.precision)
    if watch.precision > problem.precision:  # autocast inside the model
        product = difference(watch.precision)
    return product


def unrolled(problem: MetaProblem) -> Hypergradient:
    """Exact, by differentiating the gradient itself (double backward): the slow reference."""
    weights = problem.weights.detach().requires_grad_()
    gradients = {
        name: gradient if gradient.requires_grad else gradient.detach().requires_grad_()
        for name, gradient in problem.train_gradients(weights, create_graph=True).items()
    }
    ahead = problem.update(gradients)
    meta_loss, cotangents = _cotangents(problem, ahead)
    # Of all ranks that is the way back through the sum of their gradients.
    sources = [weights, *gradients.values()]
    value, *tangents = _grad([ahead.parameters[n] for n in gradients], sources, cotangents)
    direction = dict(zip(gradients, sums_over_ranks(tangents), strict=True))
    known = Known(problem.weights, gradients, problem.first.accumulated)
    parts = both_ways(problem, known, direction, value)
    return Hypergradient(value, meta_loss, ahead.num_zero_moments, parts)


def _cotangents(problem: MetaProblem, ahead: PseudoUpdate) -> tuple[MetaLoss, list[Tensor]]:
    """L_meta at θ̂, and c, this rank's, in the order of the gradients."""

    def cotangents(meta_loss: MetaLoss, holders: Parameters) -> tuple[Tensor, ...]:
        found = problem.gradients_at(
            {name: holders[name] for name in ahead.gradients},
            meta_loss.value,
            problem.scaled(torch.ones_like(meta_loss.value)),
            # The graph of the meta losses that came as such is wanted once more.
            retain_graph=isinstance(problem.meta, ExitLosses),
        )
        return tuple(torch.zeros_like(holders[n]) if g is None else g for n, g in found.items())

    meta_loss, found = problem.meta_loss(leaves(ahead.parameters), cotangents)
    return meta_loss, list(map(problem.unscaled, found))


def _direction(problem: MetaProblem, ahead: PseudoUpdate) -> tuple[MetaLoss, Parameters]:
    """L_meta at θ̂, and v = (∂U/∂gradient)ᵀ c by name."""
    meta_loss, cotangents = _cotangents(problem, ahead)
    tangents = _grad(
        [ahead.parameters[name] for name in ahead.gradients],
        list(ahead.gradients.values()),
        sums_over_ranks(cotangents),
        # A step that waited to be judged goes on waiting if this call fails further on.
        retain_graph=problem.first.ahead is not None,
    )
    return meta_loss, dict(zip(ahead.gradients, tangents, strict=True))


def _grad(
    outputs: Any, inputs: Any, cotangents: Any = None, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients, 0 where nothing depends on an input, and never sparse."""
    gradients = torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph, allow_unused=True, materialize_grads=True
    )
    return tuple(map(dense, gradients))


class Estimator:
    """The hypergradient of a meta step, and whether it can be trusted.

    "auto" is forward mode, until PyTorch says that an operation of the model has none, or until the
    check of :mod:`reweight._meta.consistency` has failed at three updates: from then on it
    is another estimator, and the log says which and why.

    Attributes:
        check: what it does at every update.

    Args:
        name: "auto", "forward", "finite_difference" or "unrolled"; changes as said.
        may_unroll: whether double backward is possible in this kind of step.

    Raises:
        ValueError: there is no such estimator, or not for this model.
    """

    def __init__(self, name: str, *, may_unroll: bool) -> None:
        check_choice("estimator", name, ("auto", "forward", "finite_difference", "unrolled"))
        if name == "unrolled" and not may_unroll:
            raise ValueError(
                "`estimator` cannot be 'unrolled' with `lagged`, `train_fraction` or a model of "
                "fully_shard."
            )
        self.name, self._given, self._may_unroll = name, name, may_unroll
        self.ladder = Ladder()
        self.check = Check(self.ladder, is_coarse=name == "finite_difference")

    def __call__(self, problem: MetaProblem) -> Hypergradient:
        """∂L_meta/∂w of this step."""
        if self.check.is_first:
            problem.require_no_aliases()
        if self.name == "unrolled":
            return unrolled(problem)
        ahead = problem.look_ahead()
        meta_loss, direction = _direction(problem, ahead)

        def estimated(names: Iterable[str]) -> tuple[Tensor, Tensor]:
            """∂L_meta/∂w by way of these parameters, and what the check needs."""
            v = {name: direction[name] for name in names}
            tangents = through_hooks(problem.everything, v)
            product = self._dual_product(problem, tangents)
            if product is None:
                product = difference_product(problem, tangents, self.ladder, self._remedy())
            value = (problem.first.sample_shares * problem.spread(product)).detach()
            return value, both_ways(problem, problem.known, v, value)

        value, parts = estimated(direction)
        found = Hypergradient(value, meta_loss, ahead.num_zero_moments)
        if problem.rows is not None:  # of which alone there is no gradient
            return found
        names = list(direction)
        has_failed = self.check(problem, parts, names, lambda some: estimated(some)[1])
        if has_failed and self._given == "auto" and self.check.failures == SEVERAL:
            self._move_on(problem, lambda: estimated(names)[1])
        return found._replace(both_ways=parts)

    def within(self, cache: PrimalCache) -> PrimalCache | None:
        """What the first forward is to run within: what takes note of it, if that is of use."""
        forward = self.name in ("auto", "forward") and self.ladder.recalls
        useful = self.check.is_first or (forward and cache.num_entries > self.ladder.too_small)
        return cache if useful else None

    def anew(self) -> "Estimator":
        """The same one, that has seen nothing yet."""
        return Estimator(self._given, may_unroll=self._may_unroll)

    def attention(self, beginning: Beginning, is_replayed: bool) -> AbstractContextManager[Any]:
        """How attention runs in the passes of a step, of which forward mode may replay the first.

        Fused kernels have no double backward, and their dropout is not that of forward mode.
        """
        if self.name == "unrolled":
            return plain_attention()
        is_replayed = is_replayed and self.name != "finite_difference"
        return PlainDropout.on(beginning.devices) if is_replayed else nullcontext()

    def _remedy(self) -> str:
        """What to use in the place of finite differences, but for what was refused."""
        if self._given != "auto":
            return "Use estimator='forward' if the model has forward mode."
        if self._may_unroll:
            return "Use estimator='unrolled'."
        return (
            "estimator='unrolled' could, without lagged, train_fraction, sharding or compilation."
        )

    def _move_on(self, problem: MetaProblem, parts: Callable[[], Tensor]) -> None:
        """To finite differences if they agree with the backward, or else to double backward."""
        before, self.name = self.name, "finite_difference"
        self.check.is_coarse = True
        if before == self.name or self.check.difference(problem, parts()) is not None:
            self.name = "unrolled" if self._may_unroll else before
            self.check.is_coarse = self.name == "finite_difference"
        if self.name != before:
            _logger.warning(
                "estimator=%r from here on: by the one before, hypergradients did not agree with "
                "the backward of the model in three updates.",
                self.name,
            )

    def _dual_product(self, problem: MetaProblem, tangents: Parameters) -> Tensor | None:
        """By forward mode; None, for good, if the model has an operation without."""
        if self.name == "finite_difference":
            return None
        try:
            return dual_product(problem, tangents, self.ladder)
        except NotCompiledError:
            raise
        except Exception as error:  # of any kind: the first forward was without
            if sharded_modules(problem.model) and not isinstance(error, NotImplementedError):
                raise  # it may be this rank's alone, and the others would wait
            if self.name == "forward":
                raise NotImplementedError(
                    "The model has an operation without forward mode. Use estimator="
                    "'finite_difference' (approximate) or 'unrolled' (exact, more memory)."
                ) from error
            _logger.warning(
                "Finite differences instead of forward mode, so hypergradients are approximate "
                "from here on: %s",
                f"{type(error).__name__}: {error}".splitlines()[0],
            )
            self.name, self.check.is_coarse = "finite_difference", True
            return None
