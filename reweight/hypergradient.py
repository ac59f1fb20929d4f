"""The hypergradient ∂L_meta/∂w: how the weights of a step change the loss after it.

θ is a constant of the meta step and L_tr = Σ_k mean_i w[i,k]·l[i,k] is linear in the weights, so
with c = ∇L_meta(θ̂) and v = (∂U/∂gradient)ᵀ c ::

    ∂L_meta/∂w[i,k] = mean's share of i · ⟨ v , ∇θ l[i,k] ⟩

for all i,k at once: one Jacobian–vector product of θ ↦ l. The identity is that of L2RW (Ren et al.,
ICML 2018) and Meta-Weight-Net; its forward-mode form is used by PDS (Gu et al., ICLR 2025).
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from reweight.objectives import MetaLoss
from reweight.updates import Parameters, PseudoUpdate


@dataclass(frozen=True)
class MetaProblem:
    """One meta step, as functions of the parameters.

    Attributes:
        parameters: θ, the parameters that the optimizer moves, by name.
        losses: l[i,k] at θ, shape [B, K], with its graph.
        sample_shares: the share of each sample in mean_i, shape [B, 1].
        weights: w[i,k], shape [B, K], without a graph.
        update: U, gradients → θ̂.
        meta_loss: θ̂ → L_meta.
        replay: θ → l, the same forward once more, random state included.
    """

    parameters: Parameters
    losses: Tensor
    sample_shares: Tensor
    weights: Tensor
    update: Callable[[Parameters], PseudoUpdate]
    meta_loss: Callable[[Parameters], MetaLoss]
    replay: Callable[[Parameters], Tensor]

    def train_gradients(self, weights: Tensor, *, create_graph: bool = False) -> Parameters:
        """∇θ L_tr of these weights for the parameters it reaches; keeps the graph of the losses."""
        gradients = torch.autograd.grad(
            self.losses,
            list(self.parameters.values()),
            self.sample_shares * weights,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        reached = {
            name: gradient
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None
        }
        if not reached:
            raise ValueError(
                "`optimizer` must hold a parameter that the losses depend on, got none. Was the "
                "part of the model that it holds left out of the forward, or run without gradients?"
            )
        return reached


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


def forward_mode(problem: MetaProblem) -> Hypergradient:
    """Exact, by one forward-mode pass; no second-order graph."""
    # ∇θ L_tr becomes a leaf: what is differentiated below is the optimizer's arithmetic alone.
    gradients = _leaves(problem.train_gradients(problem.weights))
    update = problem.update(gradients)
    updated = _leaves(update.parameters)
    meta_loss = problem.meta_loss(updated)
    moved = list(gradients)  # θ̂ depends on the gradients of these, each on its own
    cotangents = _grad(meta_loss.value, [updated[name] for name in moved])  # c
    tangents = _grad(
        [update.parameters[name] for name in moved], list(gradients.values()), cotangents
    )
    _load_forward_mode()
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(problem.parameters[name], tangent)  # θ + ε·v
            for name, tangent in zip(moved, tangents, strict=True)
        }
        product = forward_ad.unpack_dual(problem.replay({**problem.parameters, **duals})).tangent
    if product is None:  # the losses move with nothing that the meta loss moves with
        product = torch.zeros_like(problem.losses)
    return Hypergradient(
        problem.sample_shares * product, _detached(meta_loss), update.num_zero_moments
    )


def unrolled(problem: MetaProblem) -> Hypergradient:
    """Exact, by differentiating the gradient itself (double backward): the slow reference."""
    weights = problem.weights.detach().requires_grad_()
    update = problem.update(problem.train_gradients(weights, create_graph=True))
    meta_loss = problem.meta_loss(update.parameters)
    (value,) = _grad(meta_loss.value, [weights])
    return Hypergradient(value, _detached(meta_loss), update.num_zero_moments)


@functools.cache
def _load_forward_mode() -> None:
    """What PyTorch loads at the first use of forward mode warns of a deprecation of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _grad(outputs: Any, inputs: Any, cotangents: Any = None) -> tuple[Tensor, ...]:
    """Gradients, 0 where nothing depends on an input."""
    gradients = torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
    )
    return cast(tuple[Tensor, ...], gradients)


def _leaves(tensors: Parameters) -> Parameters:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _detached(meta_loss: MetaLoss) -> MetaLoss:
    return MetaLoss(meta_loss.value.detach(), meta_loss.shares)


ESTIMATORS: dict[str, Callable[[MetaProblem], Hypergradient]] = {
    "forward": forward_mode,
    "unrolled": unrolled,
}
