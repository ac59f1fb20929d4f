"""One meta step, as functions of the parameters: what the estimators work on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from reweight._checks import noted
from reweight._optimizers.accepted import Parameters, PseudoUpdate
from reweight._passes.aliases import aliases, second_reference
from reweight._passes.differences import working_precision
from reweight._passes.forward import ExitForward
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.snapshots import Beginning
from reweight._ranks.collectives import is_sharded, num_ranks, sums_by_name
from reweight._ranks.shards import parameters_of
from reweight.batches import Batch, num_samples, on_device_of, rows_of
from reweight.losses import ExitLosses
from reweight.objectives import MetaLoss, Objective, require_meta_loss

Judge: TypeAlias = Callable[[MetaLoss, Parameters], tuple[Tensor, ...]]
"""Takes L_meta and what holds θ̂ by name, for as long as it does."""


class FirstForward(NamedTuple):
    """The forward of the train batch.

    Attributes:
        batch: inputs and target.
        beginning: what it began with.
        losses: what it came to, with its graph.
        cache: what its products came to.
        moved: the parameters that the look-ahead moves, by name.
        accumulated: the gradients that those of L_tr are added to, by name.
        sample_shares: the factor of w[i,k]·l[i,k] in L_tr, shape [B, 1]: the share of each sample
            in mean_i, times the scale of the call.
        keep_graph: whether the graph of the losses is wanted once more.
        gradients: what came of that, where the backward has been run already, by name.
        before: what the optimizer's parameters were, where it has stepped since, by name.
        ahead: and what that step depends on.
    """

    batch: Batch
    beginning: Beginning
    losses: ExitLosses
    cache: PrimalCache
    moved: Parameters
    accumulated: Parameters
    sample_shares: Tensor
    keep_graph: bool
    gradients: Parameters | None = None
    before: Parameters | None = None
    ahead: PseudoUpdate | None = None


class Known(NamedTuple):
    """Weights, the gradient that comes of them on all ranks, and what in it is from before."""

    weights: Tensor
    gradients: Parameters
    accumulated: Parameters


class Hypergradient(NamedTuple):
    """∂L_meta/∂w and what came with it, all without a graph.

    Attributes:
        value: shape [B, K], that of this rank's samples.
        meta_loss: L_meta at θ̂ and the shares it rests on.
        num_zero_moments: entries of the update with no derivative, taken as 0.
        both_ways: what tells whether it agrees with the backward, as ``consistency.both_ways``
            gives it, shape [2]; None where that cannot be told.
    """

    value: Tensor
    meta_loss: MetaLoss
    num_zero_moments: Tensor | int
    both_ways: Tensor | None = None


def gradients_of(
    parameters: Parameters, *, average: bool = False, copy: bool = False
) -> Parameters:
    """What ``.grad`` holds, by name, never sparse; averaged over the ranks, or copied, if asked."""
    gradients = {n: dense(p.grad.detach()) for n, p in parameters.items() if p.grad is not None}
    if not average:
        return {n: gradient.clone() for n, gradient in gradients.items()} if copy else gradients
    return sums_by_name({n: g / num_ranks() for n, g in gradients.items()}, parameters)


def dense(tensor: Tensor) -> Tensor:
    """The same numbers, never sparse."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def leaves(tensors: Parameters) -> Parameters:
    """The same numbers, with nothing before them."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _taken(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient, and what stands in ``.grad``, which is taken away."""
    parts = [dense(each) for each in (gradient, parameter.grad) if each is not None]
    parameter.grad = None
    return sum(parts[1:], parts[0]) if parts else None


@dataclass
class MetaProblem:
    """One meta step after that first forward, as functions of the parameters; the state is now's.

    Attributes:
        forward: inputs and target → losses.
        model: whose parameters these are.
        objective: losses of the meta batch → L_meta.
        first: the forward at θ.
        after: what the forward of the meta batch begins with.
        rows: what the estimator sees of its batch; None for all.
        meta: the meta batch; or its losses with their graph, where it has gone through the updated
            model already.
        weights: w[i,k], shape [B, K], without a graph.
        update: U, gradients → θ̂.
        grad_scale: what gradients are multiplied by on their way through low precision, or None.
        begins_at_zero: whether all these weights are 0, of purpose.
        everything: all parameters of the model, by name.
        known: the weights and gradients by which ⟨v, ∇L_tr⟩ is known once more: this step's, or,
            where all weights are 0 and so is that, those of weights of 1. Set by the look-ahead.
        precision: spacing of the numbers that the forward computes with.
    """

    forward: ExitForward
    model: nn.Module
    objective: Objective
    first: FirstForward
    after: Beginning
    rows: Tensor | None
    meta: Batch | ExitLosses
    weights: Tensor
    update: Callable[[Parameters], PseudoUpdate]
    grad_scale: Tensor | None
    begins_at_zero: bool = False
    known: Known = field(init=False)
    everything: Parameters = field(init=False)
    precision: float = field(init=False)

    def __post_init__(self) -> None:
        self.everything = parameters_of(self.model)
        self.precision = working_precision(self.first.moved)

    def meta_loss(self, at: Parameters, judge: Judge) -> tuple[MetaLoss, tuple[Tensor, ...]]:
        """L_meta at θ̂, and what the judge makes of it with θ̂ in place."""
        meta = self.meta
        in_place = isinstance(meta, ExitLosses)
        holders = {n: self.everything[n] if in_place or is_sharded(p) else p for n, p in at.items()}

        def then(losses: ExitLosses) -> tuple[MetaLoss, tuple[Tensor, ...]]:
            value, shares = require_meta_loss(self.objective(losses))
            return MetaLoss(value.detach(), shares), judge(MetaLoss(value, shares), holders)

        if isinstance(meta, ExitLosses):
            return then(meta)
        self.after.replay()
        with noted(lambda: "This was at the `meta` batch, in the look-ahead."):
            return self.forward.at(at, self.after.buffers, *meta, then)

    def replay(
        self,
        at: Parameters,
        tangents: Parameters,
        within: AbstractContextManager[Any],
        graph: bool = False,
    ) -> Tensor:
        """The losses at some other θ, or with tangents: the same forward again, within the context.

        The random state is replayed, and only the rows are seen. There is no graph unless asked
        for.
        """
        first, rows = self.first, self.rows
        inputs, target = first.batch
        if rows is not None:
            inputs, target = rows_of(inputs, rows), rows_of(target, rows)
        first.beginning.replay()
        values = {**self.everything, **(first.before or {}), **at}
        values = {
            name: value.detach().requires_grad_(graph and self.everything[name].requires_grad)
            for name, value in values.items()
        }
        return self.forward.at(
            values,
            first.beginning.buffers,
            inputs,
            target,
            lambda exits: exits.losses,
            within=within,
            tangents=tangents,
        )

    def spread(self, product: Tensor) -> Tensor:
        """Of what is linear in the losses of the rows, an unbiased estimate for all samples."""
        if self.rows is None:
            return product
        # E[spread] is the product of all rows: each is drawn with probability n / B. A row of the
        # batch is one of the losses, or, of a language model, as many as it has tokens.
        losses, rows, num_rows = self.first.losses.losses, self.rows, num_samples(self.first.batch)
        whole = torch.zeros_like(losses).view(num_rows, -1, losses.shape[1])
        whole[on_device_of(whole, rows)] = product.view(len(rows), -1, losses.shape[1]) * (
            num_rows / len(rows)
        )
        return whole.view_as(losses)

    def train_gradients(self, weights: Tensor, *, create_graph: bool = False) -> Parameters:
        """What ``.grad`` will hold on every rank with these weights, or holds already."""
        first = self.first
        if first.gradients is not None:
            return {name: self.unscaled(gradient) for name, gradient in first.gradients.items()}
        if self.begins_at_zero and not create_graph:
            weights = torch.ones_like(weights)  # of which the others are 0 times
        gradients = self.gradients_at(
            first.moved,
            first.losses.losses,
            self.scaled(first.sample_shares * weights),
            retain_graph=first.keep_graph or create_graph,
            create_graph=create_graph,
        )
        reached = {name: self.unscaled(g) for name, g in gradients.items() if g is not None}
        if not reached:
            raise ValueError(
                "`optimizer` must hold a parameter that the losses depend on, got none. Was the "
                "part of the model that it holds left out of the forward, or run without gradients?"
            )
        if self.begins_at_zero and not create_graph:
            # The sum over the ranks of what is averaged again: no rank needs to know the others'.
            ranks = 1 if any(map(is_sharded, reached.values())) else num_ranks()
            self.known = Known(weights, {n: ranks * g for n, g in reached.items()}, {})
            reached = {name: torch.zeros_like(gradient) for name, gradient in reached.items()}
        for name, gradient in first.accumulated.items():
            gradient = self.unscaled(gradient)
            if not is_sharded(gradient):
                gradient = gradient / num_ranks()  # to be averaged, as they are added up
            reached[name] = reached[name] + gradient if name in reached else gradient
        return sums_by_name(reached, first.moved)

    def gradients_at(
        self, parameters: Parameters, outputs: Tensor, cotangents: Tensor, **options: bool
    ) -> dict[str, Tensor | None]:
        """∂outputs/∂parameters by name, never sparse; None if the outputs do not depend on one.

        Those of this rank; for shards the sum over all, which FSDP's backward brings to ``.grad``.
        That must be empty before: a backward that the model's own backward runs ends there too.

        Raises:
            ValueError: one was to take the place of the model's, which the outputs depend on.
        """
        tensors = list(parameters.values())
        if any(map(is_sharded, tensors)):
            # Times the ranks, for that is a mean.
            outputs.backward(num_ranks() * cotangents, **options)
            return {name: _taken(parameter, None) for name, parameter in parameters.items()}
        replaced = [name for name, p in parameters.items() if p is not self.everything.get(name, p)]
        tensors += [self.everything[name] for name in replaced]
        found = torch.autograd.grad(outputs, tensors, cotangents, allow_unused=True, **options)
        gradients, beside = found[: len(parameters)], found[len(parameters) :]
        reached = [name for name, g in zip(replaced, beside, strict=True) if g is not None]
        if reached:
            raise second_reference(reached)
        return {
            name: _taken(parameter, gradient)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }

    def require_no_aliases(self) -> None:
        """Raise ValueError where the forward read a parameter by another tensor without a graph."""
        if self.first.before is not None:  # the optimizer has stepped since; it was copied
            return
        if found := aliases(self.first.moved, self.first.cache.there_before()):
            raise second_reference(found)

    def look_ahead(self) -> PseudoUpdate:
        """The step with these weights, of gradients that are leaves: the optimizer's arithmetic."""
        ahead = self.first.ahead or self.update(leaves(self.train_gradients(self.weights)))
        if not self.begins_at_zero:
            self.known = Known(self.weights, ahead.gradients, self.first.accumulated)
        return ahead

    def scaled(self, cotangent: Tensor) -> Tensor:
        """A cotangent, ready for its way through low precision."""
        return cotangent if self.grad_scale is None else cotangent * self.grad_scale

    def unscaled(self, gradient: Tensor) -> Tensor:
        """What came of it, back in its own size."""
        return gradient if self.grad_scale is None else gradient / self.grad_scale.to(gradient)


def relative_difference(parts: Tensor) -> Tensor:
    """That of the two sums, from the parts of all ranks, added up, shape [2]; 0 where both are."""
    difference, size = parts
    return torch.div(difference.abs(), size.clamp(min=torch.finfo(size.dtype).tiny))
