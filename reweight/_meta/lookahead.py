"""Looking one step ahead: what the optimizer will make of a step, and how good that is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reweight._checks import check_choice, check_function, check_number, check_positive, kind
from reweight._meta.problem import FirstForward, MetaProblem, dense
from reweight._optimizers.accepted import (
    AnyOptimizer,
    Exactness,
    Parameters,
    check_differentiable,
    held_parameters,
    log_what_stays,
    require_apart,
)
from reweight._optimizers.pseudo_update import pseudo_update
from reweight._passes.forward import ExitForward
from reweight._passes.snapshots import Beginning
from reweight._ranks.collectives import is_sharded, num_ranks
from reweight._ranks.shards import require_reduced
from reweight.batches import Batch, drawn_rows
from reweight.losses import ExitLosses
from reweight.objectives import Objective


@dataclass
class Lookahead:
    """The hypergradient of the user's next step. The options are those of ``MetaReweightStep``."""

    model: nn.Module
    forward: ExitForward
    optimizers: tuple[AnyOptimizer, ...]
    objective: Objective
    exactness: Exactness
    clip_grad_norm: float | None
    scaler: torch.amp.GradScaler | None
    train_fraction: float
    moves: Callable[[str], bool] | None
    waiting: FirstForward | None = field(default=None, init=False)
    """The step that the next train batch will judge, as :meth:`postponed` made it."""

    def __post_init__(self) -> None:
        check_choice("pseudo_update", self.exactness, ("exact", "gradient_descent"))
        if self.clip_grad_norm is not None:
            check_positive("clip_grad_norm", self.clip_grad_norm)
        check_number("train_fraction", self.train_fraction)
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"`train_fraction` must lie in (0, 1], got {self.train_fraction}.")
        for optimizer in self.optimizers:
            check_differentiable(optimizer, self.exactness)
        if self.scaler is not None and not hasattr(self.scaler, "scale"):
            raise TypeError(f"`scaler` must be a GradScaler, got {kind(self.scaler)}.")
        check_function("objective", self.objective, "ExitLosses → MetaLoss")
        check_function("moves", self.moves, "parameter name → bool")
        require_apart(self.moved())
        log_what_stays(self.model, self.optimizers)

    def held(self) -> Parameters:
        """The trainable parameters that the optimizers hold, by name."""
        return held_parameters(self.model, self.optimizers)

    def moved(self) -> Parameters:
        """Those of them that the look-ahead moves.

        Raises:
            ValueError: there is none.
        """
        moved = held_parameters(self.model, self.optimizers, self.moves)
        if not moved and self.held():
            raise ValueError("`moves` must choose a parameter of the optimizer, got none.")
        if not moved:
            raise ValueError(
                "`model` must train by the optimizer of this step, got parameters that are frozen "
                "or others, new ones as of a move to another device. Move and freeze the model "
                "first, then create the optimizer, then the step."
            )
        for name, parameter in moved.items():
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"`model` must have no post-accumulate hook of a parameter, got one of {name}: "
                    "what it does to `.grad` cannot be part of the look-ahead. Use "
                    "parameter.register_hook, which sees the gradient before it is added."
                )
        return moved

    def require_unscaled(self) -> None:
        """Raise ValueError if the optimizer is stepped by a GradScaler."""
        if self.scaler is not None and self.scaler.is_enabled():
            raise ValueError(
                "`scaler` steps the optimizer itself: call step.backward, scaler.step(optimizer) "
                "and scaler.update() in its place."
            )

    def clip(self) -> None:
        """Clip ``.grad`` as the look-ahead has done."""
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.held().values(), self.clip_grad_norm)

    def scaled(self, tensor: Tensor) -> Tensor:
        """What a gradient is to begin with, where a GradScaler is in use."""
        return tensor if self.scaler is None else self.scaler.scale(tensor)

    def beside(
        self, accumulated: Parameters, losses: ExitLosses, moved: Parameters, scale: float | Tensor
    ) -> Parameters:
        """What the gradient of the weighted losses is added to, that of the auxiliary loss as well.

        Raises:
            ValueError: there is an auxiliary loss of sharded parameters.
        """
        auxiliary = losses.auxiliary
        if auxiliary is None or not moved or not auxiliary.requires_grad:
            return accumulated
        if any(map(is_sharded, moved.values())):
            raise ValueError(
                "`loss` must return ExitLosses without `auxiliary` for a model of fully_shard, "
                "whose gradients come by its own backward. Add it to a loss that is weighted."
            )
        found = torch.autograd.grad(
            auxiliary,
            list(moved.values()),
            self.scaled(scale * torch.ones_like(auxiliary)),
            retain_graph=True,
            allow_unused=True,
        )
        gradients = {n: dense(g) for n, g in zip(moved, found, strict=True) if g is not None}
        both = {n: g + accumulated[n] if n in accumulated else g for n, g in gradients.items()}
        return {**accumulated, **both}

    def backward(
        self,
        first: FirstForward,
        losses: ExitLosses,
        weights: Tensor,
        scale: float | Tensor,
        keep: bool,
    ) -> None:
        """The gradient of L_tr into ``.grad``; the graph is kept for its values, if it is."""
        factors = first.sample_shares * weights
        if num_ranks() > 1:  # whose gradients DistributedDataParallel averages
            factors = num_ranks() * factors
        outputs, cotangents = [losses.losses], [self.scaled(factors)]
        if losses.auxiliary is not None and losses.auxiliary.requires_grad:
            outputs.append(losses.auxiliary)
            cotangents.append(self.scaled(scale * torch.ones_like(losses.auxiliary)))
        torch.autograd.backward(outputs, cotangents, retain_graph=keep)

    def problem(
        self,
        first: FirstForward,
        after: Beginning,
        meta: Batch | ExitLosses,
        weights: Tensor,
        seed: int,
    ) -> MetaProblem:
        """The meta step after that forward; the seed draws the rows that it is learned from.

        It is of all rows now and then, for these can be checked.
        """
        require_reduced(self.model)
        fraction = 1.0 if seed % _UPDATES_BETWEEN_CHECKS == 0 else self.train_fraction
        rows = drawn_rows(first.batch, fraction, seed)
        return self._problem(first, after, meta, weights, rows)

    def postponed(self, first: FirstForward, weights: Tensor) -> FirstForward:
        """The same, to be judged when the optimizer has made the step: by the next train batch.

        What the step will change is copied, and the step itself, which it depends on, taken now.
        """
        first = first._replace(gradients={n: g.clone() for n, g in (first.gradients or {}).items()})
        ahead = self._problem(first, first.beginning, first.losses, weights, None).look_ahead()
        held = self.held()
        before = {name: parameter.detach().clone() for name, parameter in held.items()}
        first.cache.follow({id(parameter): before[name] for name, parameter in held.items()})
        moved = {name: before[name] for name in first.moved}
        return first._replace(moved=moved, before=before, ahead=ahead)

    def still_waiting(self) -> FirstForward | None:
        """What waits, unless a parameter that it moves was frozen since."""
        waiting = self.waiting
        if waiting is not None and not waiting.moved.keys() <= self.moved().keys():
            waiting = None
        return waiting

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a step that waits belongs to the model that it was made of."""
        return {**vars(self), "waiting": None}

    def _problem(
        self,
        first: FirstForward,
        after: Beginning,
        meta: Batch | ExitLosses,
        weights: Tensor,
        rows: Tensor | None,
    ) -> MetaProblem:
        update = partial(
            pseudo_update,
            self.optimizers,
            first.moved,
            exactness=self.exactness,
            clip_grad_norm=self.clip_grad_norm,
        )
        return MetaProblem(
            self.forward,
            self.model,
            self.objective,
            first,
            after,
            rows,
            meta,
            weights.detach(),
            update,
            None if self.scaler is None else self.scaled(first.losses.losses.new_ones(())),
        )


_UPDATES_BETWEEN_CHECKS = 64  # of a train_fraction: what it saves stays saved
