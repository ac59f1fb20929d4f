"""The hypergradient ∂L_meta/∂w: how the weights of a step change the loss after it.

θ is a constant of the meta step and L_tr = Σ_k mean_i w[i,k]·l[i,k] is linear in the weights, so
with c = ∇L_meta(θ̂) and v = (∂U/∂gradient)ᵀ c ::

    ∂L_meta/∂w[i,k] = mean's share of i · ⟨ v , ∇θ l[i,k] ⟩

for all i,k at once: one Jacobian–vector product of θ ↦ l. The identity is that of L2RW (Ren et al.,
ICML 2018) and Meta-Weight-Net; its forward-mode form is used by PDS (Gu et al., ICLR 2025).
"""

import logging
import warnings
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from reweight._checks import check_choice
from reweight._meta.problem import Hypergradient, MetaProblem, dense, leaves
from reweight._optimizers.accepted import Parameters
from reweight._optimizers.pseudo_update import PseudoUpdate
from reweight._passes.differences import DifferenceWatch
from reweight._passes.forward_mode import load_forward_mode, tangents_follow_gradients
from reweight._passes.ladder import Ladder, NotCompiledError
from reweight._ranks.collectives import num_ranks, sums_over_ranks
from reweight._ranks.shards import is_sharded, sharded_modules, whole
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


def difference_product(problem: MetaProblem, tangents: Parameters, ladder: Ladder) -> Tensor:
    """⟨v, ∇θ l⟩ approximately, by two forwards at θ ± h·v; for what has no forward mode.

    h·‖v‖ is precision^⅔·‖θ‖, 2e-5 of ‖θ‖ in float32 and 0.04 in bfloat16: rounding, which grows as
    precision/h, is balanced against the kinks of ReLU and the like, of which about √h are passed
    (``benchmarks/finite_difference.py`` measures both). Wrong where the model cuts tensors from the
    graph: differences see through it.
    """
    lengths = [
        torch.stack([whole(tensor.detach().norm()) for tensor in tensors]).norm()
        for tensors in ([problem.first.moved[name] for name in tangents], tangents.values())
    ]
    watch = DifferenceWatch(ladder)

    def losses_at(distance: Tensor) -> Tensor:
        at = {n: problem.first.moved[n].detach() + distance * v for n, v in tangents.items()}
        try:
            return ladder.run(lambda: problem.replay(at, {}, watch, ladder.needs_graph))
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(
                    "Finite differences run the forward again, without a graph, where it failed. "
                    "Use estimator='unrolled' if it needs one."
                )
            raise

    def difference(precision: float) -> Tensor:
        step = precision ** (2 / 3) * lengths[0] / lengths[1]
        step = torch.where(step.isfinite() & (step > 0), step, 1)  # v = 0: any step gives 0
        above, below = (losses_at(sign * step).detach() for sign in (1, -1))
        return (above - below) / (2 * step)

    product = difference(problem.precision)
    if watch.precision > problem.precision:  # autocast inside the model
        product = difference(watch.precision)
    if watch.cuts:
        warnings.warn(
            "The model cuts tensors from the graph (detach or no_grad), which finite differences "
            "cannot see: hypergradients are wrong where the cut matters. Use estimator='forward' "
            "if the model has forward mode.",
            stacklevel=2,
        )
    return product


def unrolled(problem: MetaProblem) -> Hypergradient:
    """Exact, by differentiating the gradient itself (double backward): the slow reference."""
    weights = problem.weights.detach().requires_grad_()
    update = problem.update(problem.train_gradients(weights, create_graph=True))
    meta_loss, (value,) = problem.meta_loss(
        update.parameters, lambda meta_loss, _: _grad(meta_loss.value, [weights])
    )
    return Hypergradient(value, meta_loss, update.num_zero_moments)


def _direction(problem: MetaProblem, ahead: PseudoUpdate) -> tuple[MetaLoss, Parameters]:
    """L_meta at θ̂, and v = (∂U/∂gradient)ᵀ c by name."""
    gradients, updated = ahead.gradients, ahead.parameters

    def cotangent(meta_loss: MetaLoss, holders: Parameters) -> tuple[Tensor, ...]:
        found = problem.gradients_at(
            {name: holders[name] for name in gradients},
            meta_loss.value,
            problem.scaled(torch.ones_like(meta_loss.value)),
            # The graph of the meta losses that came as such is wanted once more.
            retain_graph=isinstance(problem.meta, ExitLosses),
        )
        return tuple(torch.zeros_like(holders[n]) if g is None else g for n, g in found.items())

    meta_loss, cotangents = problem.meta_loss(leaves(updated), cotangent)  # c
    tangents = _grad(
        [updated[name] for name in gradients],
        list(gradients.values()),
        sums_over_ranks([problem.unscaled(cotangent) for cotangent in cotangents]),
        # A step that waited to be judged goes on waiting if this call fails further on.
        retain_graph=problem.first.ahead is not None,
    )
    return meta_loss, dict(zip(gradients, tangents, strict=True))


@torch.no_grad()
def _through_hooks(parameter: Tensor, tangent: Tensor) -> Tensor:
    """Back through the hooks that change the parameter's gradient before it reaches U.

    They are taken as linear and symmetric, which masks, factors and projections are: so each is its
    own transpose. Those of a sharded parameter are not called in a backward either.
    """
    hooks = parameter._backward_hooks
    if not hooks or is_sharded(parameter):
        return tangent
    for hook in hooks.values():
        tangent = tangent.clone()  # it may be changed in place
        result = hook(tangent)
        tangent = tangent if result is None else result
    return tangent


def _warn_unless_consistent(
    problem: MetaProblem, gradients: Parameters, tangents: Parameters, value: Tensor
) -> None:
    """⟨v, ∇L_tr⟩ is known twice, as Σ w·∂L_meta/∂w and from the gradient that the backward gave.

    A difference is what forward mode does not see of the backward, or of the hooks; the rounding of
    either is far below the cubic root of the precision.
    """
    terms = problem.weights * value
    by_backward = sum(
        whole((tangent * gradients[name].detach()).sum()) for name, tangent in tangents.items()
    )
    difference = float((terms.sum() - by_backward).abs() / terms.abs().sum())
    if difference <= problem.precision ** (1 / 3):
        return
    watch = DifferenceWatch(Ladder())  # there may be autocast inside the model
    problem.replay({}, {}, watch)
    if difference > watch.precision ** (1 / 3):
        warnings.warn(
            "Hypergradients are approximate: the backward of the model is not the derivative of "
            f"its forward, by {difference:.1%} of what the weights do. Does a hook of a module or "
            "an activation change gradients, or one of a parameter other than by a mask or factor, "
            "or a custom autograd.Function, or does the forward differ when it is run again? "
            "Write a scaled gradient as x*s + (x*(1-s)).detach(), or use estimator='unrolled'.",
            stacklevel=2,
        )


def _grad(
    outputs: Any, inputs: Any, cotangents: Any = None, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients, 0 where nothing depends on an input, and never sparse."""
    gradients = torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph, allow_unused=True, materialize_grads=True
    )
    return tuple(map(dense, gradients))


class Estimator:
    """The hypergradient of a meta step.

    "auto" is forward mode, until PyTorch says that an operation of the model has none: from then on
    it is finite differences, and the log says which operation decided. Once, where both ways to the
    same number are there (all rows, no accumulated gradients, a single rank, for several would have
    to send something), it is made sure that they agree.

    Args:
        name: "auto", "forward", "finite_difference" or "unrolled"; changes as said.
        model: which is differentiated.

    Raises:
        ValueError: there is no such estimator, or not for this model.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        check_choice("estimator", name, ("auto", "forward", "finite_difference", "unrolled"))
        if name == "unrolled" and sharded_modules(model):
            raise ValueError("`estimator` cannot be 'unrolled' with a model of fully_shard.")
        self.name = name
        self.ladder = Ladder()
        self._is_checked = False

    def __call__(self, problem: MetaProblem) -> Hypergradient:
        """∂L_meta/∂w of this step."""
        check = not (self._is_checked or problem.first.accumulated) and problem.rows is None
        if self.name == "unrolled":
            return unrolled(problem)
        ahead = problem.look_ahead()
        meta_loss, direction = _direction(problem, ahead)
        tangents = {
            name: _through_hooks(problem.everything[name], tangent)
            for name, tangent in direction.items()
        }
        product = (
            None if self.name == "finite_difference" else self._dual_product(problem, tangents)
        )
        exact = product is not None
        if product is None:
            product = difference_product(problem, tangents, self.ladder)
        value = (problem.first.sample_shares * problem.spread(product)).detach()
        if check and exact and num_ranks() == 1:
            _warn_unless_consistent(problem, ahead.gradients, direction, value)
        self._is_checked = self._is_checked or check
        return Hypergradient(value, meta_loss, ahead.num_zero_moments)

    def _dual_product(self, problem: MetaProblem, tangents: Parameters) -> Tensor | None:
        """By forward mode; None, for good, if the model has an operation without."""
        if self.name == "finite_difference":
            return None
        try:
            return dual_product(problem, tangents, self.ladder)
        except NotCompiledError:
            raise
        except Exception as error:  # of any kind: the first forward was without
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
            self.name = "finite_difference"
            return None
