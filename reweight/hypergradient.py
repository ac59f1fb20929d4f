"""The hypergradient ∂L_meta/∂w: how the weights of a step change the loss after it.

θ is a constant of the meta step and L_tr = Σ_k mean_i w[i,k]·l[i,k] is linear in the weights, so
with c = ∇L_meta(θ̂) and v = (∂U/∂gradient)ᵀ c ::

    ∂L_meta/∂w[i,k] = mean's share of i · ⟨ v , ∇θ l[i,k] ⟩

for all i,k at once: one Jacobian–vector product of θ ↦ l. The identity is that of L2RW (Ren et al.,
ICML 2018) and Meta-Weight-Net; its forward-mode form is used by PDS (Gu et al., ICLR 2025).
"""

import logging
import warnings
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from reweight.distributed import num_ranks, sums_over_ranks
from reweight.duals import load_forward_mode, tangents_follow_gradients
from reweight.forwards import DifferenceWatch
from reweight.objectives import MetaLoss
from reweight.optimizers import Parameters
from reweight.problem import MetaProblem, dense, leaves
from reweight.shards import is_sharded, whole

_logger = logging.getLogger("reweight")


class Hypergradient(NamedTuple):
    """∂L_meta/∂w and what came with it, all without a graph.

    Attributes:
        value: shape [B, K], that of this rank's samples.
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
        within = tangents_follow_gradients(problem.first.values)
        losses = problem.replay({}, tangents, within)  # θ + ε·v
        value, product = forward_ad.unpack_dual(losses)
    # None where the losses move with nothing that the meta loss moves with.
    return torch.zeros_like(value) if product is None else product


def difference_product(problem: MetaProblem, tangents: Parameters) -> Tensor:
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
    watch = DifferenceWatch()

    def difference(precision: float) -> Tensor:
        step = precision ** (2 / 3) * lengths[0] / lengths[1]
        step = torch.where(step.isfinite() & (step > 0), step, 1)  # v = 0: any step gives 0
        above, below = (
            problem.replay(
                {n: problem.first.moved[n].detach() + sign * step * v for n, v in tangents.items()},
                {},
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
        update.parameters, lambda meta_loss, _: _grad(meta_loss.value, [weights])
    )
    return Hypergradient(value, meta_loss, update.num_zero_moments)


class _Direction(NamedTuple):
    """v by name, and what came with it, the gradient that it is a cotangent of first."""

    gradients: Parameters
    tangents: Parameters
    meta_loss: MetaLoss
    num_zero_moments: Tensor | int


def _direction(problem: MetaProblem) -> _Direction:
    """V = (∂U/∂gradient)ᵀ c."""
    gradients, update = problem.look_ahead()

    def cotangent(meta_loss: MetaLoss, updated: Parameters) -> tuple[Tensor, ...]:
        found = problem.gradients_at(
            {name: updated[name] for name in gradients},
            meta_loss.value,
            problem.scaled(torch.ones_like(meta_loss.value)),
            retain_graph=problem.keep_meta_graph,
        )
        return tuple(torch.zeros_like(updated[n]) if g is None else g for n, g in found.items())

    meta_loss, cotangents = problem.meta_loss(leaves(update.parameters), cotangent)  # c
    tangents = _grad(
        [update.parameters[name] for name in gradients],
        list(gradients.values()),
        sums_over_ranks([problem.unscaled(cotangent) for cotangent in cotangents]),
        # A step that waited to be judged goes on waiting if this call fails further on.
        retain_graph=problem.first.ahead is not None,
    )
    named = dict(zip(gradients, tangents, strict=True))
    return _Direction(gradients, named, meta_loss, update.num_zero_moments)


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


def _warn_unless_consistent(problem: MetaProblem, direction: _Direction, value: Tensor) -> None:
    """⟨v, ∇L_tr⟩ is known twice, as Σ w·∂L_meta/∂w and from the gradient that the backward gave.

    A difference is what forward mode does not see of the backward, or of the hooks; the rounding of
    either is far below the cubic root of the precision.
    """
    terms = problem.weights * value
    by_backward = sum(
        whole((tangent * direction.gradients[name].detach()).sum())
        for name, tangent in direction.tangents.items()
    )
    difference = float((terms.sum() - by_backward).abs() / terms.abs().sum())
    if difference <= problem.precision ** (1 / 3):
        return
    watch = DifferenceWatch()  # there may be autocast inside the model
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


_FUNCTION_ADVICE = (
    " They are wrong if its backward is not its derivative, as where gradients are scaled or "
    "reversed: write that as x*s + (x*(1-s)).detach(), or give it a jvp, or use "
    "estimator='unrolled'."
)

ESTIMATORS = ("auto", "forward", "finite_difference", "unrolled")


def estimate(
    estimator: str, problem: MetaProblem, *, check: bool = False
) -> tuple[Hypergradient, str]:
    """The hypergradient, and which estimator to use from now on.

    "auto" is forward mode, until PyTorch says that an operation of the model has none: from then on
    it is finite differences, and the log says which operation decided. On demand it is checked that
    forward mode and backward agree, which takes all rows, no accumulated gradients, and a wait;
    of several ranks none is checked, since it would take them to send something.
    """
    if estimator == "unrolled":
        return unrolled(problem), estimator
    direction = _direction(problem)
    tangents = {
        name: _through_hooks(problem.everything[name], tangent)
        for name, tangent in direction.tangents.items()
    }
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
                "from here on: %s%s",
                str(error).splitlines()[0],
                _FUNCTION_ADVICE if "custom autograd.Function" in str(error) else "",
            )
            estimator = "finite_difference"
    if estimator == "finite_difference":
        product = difference_product(problem, tangents)
    value = (problem.first.sample_shares * problem.spread(product)).detach()
    if check and estimator != "finite_difference" and num_ranks() == 1:
        _warn_unless_consistent(problem, direction, value)
    return Hypergradient(value, direction.meta_loss, direction.num_zero_moments), estimator
