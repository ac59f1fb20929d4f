"""One meta step, as functions of the parameters: what the estimators work on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from reweight.batches import Batch, num_samples, rows_of
from reweight.distributed import num_ranks, sums_by_name
from reweight.forwards import Beginning, ExitForward, Gradients, working_precision
from reweight.losses import ExitLosses
from reweight.objectives import MetaLoss, Objective, require_meta_loss
from reweight.optimizers import Parameters
from reweight.shards import is_sharded, parameters_of
from reweight.updates import PseudoUpdate
from reweight.values import Values

Judge: TypeAlias = Callable[[MetaLoss, Parameters], tuple[Tensor, ...]]
"""Takes L_meta and what holds θ̂ by name, for as long as it does."""


class LookAhead(NamedTuple):
    """The step that is judged, of gradients that are leaves: the optimizer's arithmetic alone."""

    gradients: Parameters
    update: PseudoUpdate


class FirstForward(NamedTuple):
    """The forward of the train batch.

    Attributes:
        batch: inputs and target.
        beginning: what it began with.
        losses: what it came to, with its graph.
        values: what its products came to.
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
    values: Values
    moved: Parameters
    accumulated: Parameters
    sample_shares: Tensor
    keep_graph: bool
    gradients: Parameters | None = None
    before: Parameters | None = None
    ahead: LookAhead | None = None


def gradients_of(parameters: Parameters, *, average: bool = False) -> Parameters:
    """What ``.grad`` holds, by name, never sparse; averaged over the ranks if asked."""
    gradients = {n: dense(p.grad.detach()) for n, p in parameters.items() if p.grad is not None}
    if not average:
        return gradients
    return sums_by_name({n: g / num_ranks() for n, g in gradients.items()}, parameters)


def dense(tensor: Tensor) -> Tensor:
    """The same numbers, never sparse."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def leaves(tensors: Parameters) -> Parameters:
    """The same numbers, with nothing before them."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class MetaProblem:
    """One meta step, as functions of the parameters.

    Attributes:
        first: the forward at θ.
        everything: all parameters of the model.
        weights: w[i,k], shape [B, K], without a graph.
        update: U, gradients → θ̂.
        meta_loss: (θ̂, f) → f(L_meta, θ̂), with θ̂ in place while f runs.
        keep_meta_graph: whether the graph of the meta losses is wanted once more.
        replay: (some of θ, tangents of some, context) → l, the same forward once more, random state
            included, without a graph, of some of the rows; the model is called within the context.
        spread: what is linear in the losses of those rows → an unbiased estimate of it for all.
        grad_scale: what gradients are multiplied by on their way through low precision, or None.
        precision: spacing of the numbers that the forward computes with.
    """

    first: FirstForward
    everything: Parameters
    weights: Tensor
    update: Callable[[Parameters], PseudoUpdate]
    meta_loss: Callable[[Parameters, Judge], tuple[MetaLoss, tuple[Tensor, ...]]]
    keep_meta_graph: bool
    replay: Callable[[Parameters, Parameters, AbstractContextManager[Any]], Tensor]
    spread: Callable[[Tensor], Tensor]
    grad_scale: Tensor | None
    precision: float

    def train_gradients(self, weights: Tensor, *, create_graph: bool = False) -> Parameters:
        """What ``.grad`` will hold on every rank with these weights, or holds already."""
        first = self.first
        if first.gradients is not None:
            return {name: self.unscaled(gradient) for name, gradient in first.gradients.items()}
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
        """
        if not any(map(is_sharded, parameters.values())):
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                outputs, list(parameters.values()), cotangents, allow_unused=True, **options
            )
        else:
            before = Gradients(self.everything.values())
            before.clear()
            try:
                # Times the ranks, for that is a mean.
                outputs.backward(num_ranks() * cotangents, **options)
                found = tuple(parameter.grad for parameter in parameters.values())
            finally:
                before.restore()
        return {
            name: None if gradient is None else dense(gradient)
            for name, gradient in zip(parameters, found, strict=True)
        }

    def look_ahead(self) -> LookAhead:
        """The step with these weights."""
        if self.first.ahead is not None:
            return self.first.ahead
        gradients = leaves(self.train_gradients(self.weights))
        return LookAhead(gradients, self.update(gradients))

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
    first: FirstForward,
    rows: Tensor | None,
    meta: Batch | ExitLosses,
    weights: Tensor,
    update: Callable[[Parameters], PseudoUpdate],
    grad_scale: Tensor | None,
) -> MetaProblem:
    """The meta step after that first forward; the state is now's.

    Of its batch the estimator sees these rows, or all if they are None. The meta batch may have
    gone through the updated model already: then ``meta`` is its losses, with their graph.
    """
    after, everything = Beginning(model), parameters_of(model)
    batch, losses = first.batch, first.losses.losses
    if rows is not None:
        batch = rows_of(batch[0], rows), rows_of(batch[1], rows)

    def meta_loss(at: Parameters, judge: Judge) -> tuple[MetaLoss, tuple[Tensor, ...]]:
        in_place = isinstance(meta, ExitLosses)
        holders = {n: everything[n] if in_place or is_sharded(p) else p for n, p in at.items()}

        def then(losses: ExitLosses) -> tuple[MetaLoss, tuple[Tensor, ...]]:
            value, shares = require_meta_loss(objective(losses))
            return MetaLoss(value.detach(), shares), judge(MetaLoss(value, shares), holders)

        if isinstance(meta, ExitLosses):
            return then(meta)
        after.random_state.restore()
        return forward.at(at, after.buffers, *meta, then)

    def replay(at: Parameters, tangents: Parameters, within: AbstractContextManager[Any]) -> Tensor:
        first.beginning.random_state.restore()
        detached = {name: parameter.detach() for name, parameter in everything.items()}
        return forward.at(
            {**detached, **(first.before or {}), **at},
            first.beginning.buffers,
            *batch,
            lambda exits: exits.losses,
            within=within,
            tangents=tangents,
        )

    def spread(product: Tensor) -> Tensor:
        if rows is None:
            return product
        # E[spread] is the product of all rows: each is drawn with probability n / B. A row of the
        # batch is one of the losses, or, of a language model, as many as it has tokens.
        num_rows = num_samples(first.batch)
        whole = torch.zeros_like(losses).view(num_rows, -1, losses.shape[1])
        whole[rows] = product.view(len(rows), -1, losses.shape[1]) * (num_rows / len(rows))
        return whole.view_as(losses)

    return MetaProblem(
        first=first,
        everything=everything,
        weights=weights.detach(),
        update=update,
        meta_loss=meta_loss,
        keep_meta_graph=isinstance(meta, ExitLosses),
        replay=replay,
        spread=spread,
        grad_scale=grad_scale,
        precision=working_precision(first.moved),
    )
