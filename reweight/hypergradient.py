"""The hypergradient ∂L_meta/∂w: how the weights of a step change the loss after it.

θ is a constant of the meta step and L_tr = Σ_k mean_i w[i,k]·l[i,k] is linear in the weights, so
with c = ∇L_meta(θ̂) and v = (∂U/∂gradient)ᵀ c ::

    ∂L_meta/∂w[i,k] = mean's share of i · ⟨ v , ∇θ l[i,k] ⟩

for all i,k at once: one Jacobian–vector product of θ ↦ l. The identity is that of L2RW (Ren et al.,
ICML 2018) and Meta-Weight-Net; its forward-mode form is used by PDS (Gu et al., ICLR 2025).
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from reweight.batches import Batch
from reweight.forwards import (
    Beginning,
    DifferenceWatch,
    ExitForward,
    load_forward_mode,
    tangents_follow_gradients,
    working_precision,
)
from reweight.losses import ExitLosses
from reweight.objectives import MetaLoss, Objective, require_meta_loss
from reweight.updates import Parameters, PseudoUpdate

Judge: TypeAlias = Callable[[MetaLoss], tuple[Tensor, ...]]
_logger = logging.getLogger("reweight")


@dataclass(frozen=True)
class MetaProblem:
    """One meta step, as functions of the parameters.

    Attributes:
        parameters: θ, the parameters that the optimizer moves, by name.
        losses: l[i,k] at θ, shape [B, K], with its graph.
        sample_shares: the factor of w[i,k]·l[i,k] in L_tr, shape [B, 1]: the share of each sample
            in mean_i, times the scale of the call.
        weights: w[i,k], shape [B, K], without a graph.
        accumulated: the gradients that those of L_tr are added to, by name.
        update: U, gradients → θ̂.
        meta_loss: (θ̂, f) → f(L_meta), with θ̂ in place while f runs.
        replay: (some of θ, context) → l, the same forward once more, random state included,
            without a graph; the model is called within the context.
        grad_scale: what gradients are multiplied by on their way through low precision, or None.
        precision: spacing of the numbers that the forward computes with.
    """

    parameters: Parameters
    losses: Tensor
    sample_shares: Tensor
    weights: Tensor
    accumulated: Parameters
    update: Callable[[Parameters], PseudoUpdate]
    meta_loss: Callable[[Parameters, Judge], tuple[MetaLoss, tuple[Tensor, ...]]]
    replay: Callable[[Parameters, AbstractContextManager[Any]], Tensor]
    grad_scale: Tensor | None
    precision: float

    def train_gradients(self, weights: Tensor, *, create_graph: bool = False) -> Parameters:
        """What ``.grad`` will hold with these weights; keeps the graph of the losses."""
        gradients = torch.autograd.grad(
            self.losses,
            list(self.parameters.values()),
            self.scaled(self.sample_shares * weights),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        reached = {
            name: self.unscaled(gradient.to_dense() if gradient.is_sparse else gradient)
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None
        }
        if not reached:
            raise ValueError(
                "`optimizer` must hold a parameter that the losses depend on, got none. Was the "
                "part of the model that it holds left out of the forward, or run without gradients?"
            )
        for name, gradient in self.accumulated.items():
            gradient = self.unscaled(gradient)
            reached[name] = reached[name] + gradient if name in reached else gradient
        return reached

    def scaled(self, cotangent: Tensor) -> Tensor:
        """A cotangent, ready for its way through low precision."""
        return cotangent if self.grad_scale is None else cotangent * self.grad_scale

    def unscaled(self, gradient: Tensor) -> Tensor:
        """What came of it, back in its own size."""
        return gradient if self.grad_scale is None else gradient / self.grad_scale.to(gradient)


def meta_problem(
    *,
    forward: ExitForward,
    model: nn.Module,
    objective: Objective,
    train: Batch,
    meta: Batch,
    beginning: Beginning,
    losses: ExitLosses,
    weights: Tensor,
    parameters: Parameters,
    accumulated: Parameters,
    update: Callable[[Parameters], PseudoUpdate],
    scale: float,
    grad_scale: Tensor | None,
) -> MetaProblem:
    """The meta step whose train batch has these losses and began there; the state is now's."""
    after = Beginning(model)

    def meta_loss(at: Parameters, judge: Judge) -> tuple[MetaLoss, tuple[Tensor, ...]]:
        def then(losses: ExitLosses) -> tuple[MetaLoss, tuple[Tensor, ...]]:
            value, shares = require_meta_loss(objective(losses))
            return MetaLoss(value.detach(), shares), judge(MetaLoss(value, shares))

        after.random_state.restore()
        return forward.at(at, after.buffers, *meta, then)

    def replay(at: Parameters, within: AbstractContextManager[Any]) -> Tensor:
        beginning.random_state.restore()
        detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
        swapped = {**detached, **at}
        return forward.at(
            swapped, beginning.buffers, *train, lambda exits: exits.losses, within=within
        )

    return MetaProblem(
        parameters=parameters,
        losses=losses.losses,
        sample_shares=scale * losses.sample_shares(),
        weights=weights.detach(),
        accumulated=accumulated,
        update=update,
        meta_loss=meta_loss,
        replay=replay,
        grad_scale=grad_scale,
        precision=working_precision(parameters),
    )


class Hypergradient(NamedTuple):
    """∂L_meta/∂w and what came with it, all without a graph.

    Attributes:
        value: shape [B, K].
        meta_loss: L_meta at θ̂ and the shares it rests on.
        num_zero_moments: entries of the update with no derivative, taken as 0.
    """

    value: Tensor
    meta_loss: MetaLoss
    num_zero_moments: Tensor | int


def dual_product(problem: MetaProblem, tangents: Parameters) -> Tensor:
    """⟨v, ∇θ l⟩ exactly, by one forward-mode pass; no second-order graph."""
    load_forward_mode()
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(problem.parameters[name].detach(), tangent)  # θ + ε·v
            for name, tangent in tangents.items()
        }
        losses = problem.replay(duals, tangents_follow_gradients())
        product: Tensor | None = forward_ad.unpack_dual(losses).tangent
    # None where the losses move with nothing that the meta loss moves with.
    return torch.zeros_like(problem.losses) if product is None else product


def difference_product(problem: MetaProblem, tangents: Parameters) -> Tensor:
    """⟨v, ∇θ l⟩ approximately, by two forwards at θ ± h·v; for what has no forward mode.

    h·‖v‖ is precision^⅔·‖θ‖, 2e-5 of ‖θ‖ in float32 and 0.04 in bfloat16: rounding, which grows as
    precision/h, is balanced against the kinks of ReLU and the like, of which about √h are passed
    (``benchmarks/finite_difference.py`` measures both). Wrong where the model cuts tensors from the
    graph: differences see through it.
    """
    lengths = [
        torch.stack([tensor.detach().norm() for tensor in tensors]).norm()
        for tensors in ([problem.parameters[name] for name in tangents], tangents.values())
    ]
    watch = DifferenceWatch()

    def difference(precision: float) -> Tensor:
        step = precision ** (2 / 3) * lengths[0] / lengths[1]
        step = torch.where(step.isfinite() & (step > 0), step, 1)  # v = 0: any step gives 0
        above, below = (
            problem.replay(
                {n: problem.parameters[n].detach() + sign * step * v for n, v in tangents.items()},
                watch,
            )
            for sign in (1, -1)
        )
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
        update.parameters, lambda meta_loss: _grad(meta_loss.value, [weights])
    )
    return Hypergradient(value, meta_loss, update.num_zero_moments)


def _tangents(problem: MetaProblem) -> tuple[Parameters, MetaLoss, Tensor | int]:
    """V = (∂U/∂gradient)ᵀ c by name, and what it was computed from."""
    # ∇θ L_tr becomes a leaf: what is differentiated below is the optimizer's arithmetic alone.
    gradients = _leaves(problem.train_gradients(problem.weights))
    update = problem.update(gradients)
    updated = _leaves(update.parameters)
    moved = list(gradients)
    meta_loss, cotangents = problem.meta_loss(  # c
        updated,
        lambda meta_loss: _grad(
            meta_loss.value,
            [updated[name] for name in moved],
            problem.scaled(torch.ones_like(meta_loss.value)),
        ),
    )
    tangents = _grad(
        [update.parameters[name] for name in moved],
        list(gradients.values()),
        [problem.unscaled(cotangent) for cotangent in cotangents],
    )
    return dict(zip(moved, tangents, strict=True)), meta_loss, update.num_zero_moments


def _grad(outputs: Any, inputs: Any, cotangents: Any = None) -> tuple[Tensor, ...]:
    """Gradients, 0 where nothing depends on an input, and never sparse."""
    gradients = torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
    )
    return tuple(gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients)


def _leaves(tensors: Parameters) -> Parameters:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


ESTIMATORS = ("auto", "forward", "finite_difference", "unrolled")


def estimate(estimator: str, problem: MetaProblem) -> tuple[Hypergradient, str]:
    """The hypergradient, and which estimator to use from now on.

    "auto" is forward mode, until PyTorch says that an operation of the model has none: from then on
    it is finite differences, and the log says which operation decided.
    """
    if estimator == "unrolled":
        return unrolled(problem), estimator
    tangents, meta_loss, num_zero_moments = _tangents(problem)
    if estimator != "finite_difference":
        try:
            product = dual_product(problem, tangents)
        except (NotImplementedError, RuntimeError) as error:
            named = any(words in str(error) for words in ("forward AD", "forward mode", "jvp"))
            if not (named or isinstance(error, NotImplementedError)):
                raise
            if estimator == "forward":
                raise NotImplementedError(
                    "The model has an operation without forward mode. Use estimator="
                    "'finite_difference' (approximate) or 'unrolled' (exact, more memory)."
                ) from error
            _logger.warning(
                "Finite differences instead of forward mode, so hypergradients are approximate "
                "from here on: %s",
                str(error).splitlines()[0],
            )
            estimator = "finite_difference"
    if estimator == "finite_difference":
        product = difference_product(problem, tangents)
    value = (problem.sample_shares * product).detach()
    return Hypergradient(value, meta_loss, num_zero_moments), estimator
