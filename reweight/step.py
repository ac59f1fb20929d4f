"""MetaReweightStep: the order of events in one training step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchopt.base import GradientTransformation

from reweight.batches import Batch, unpack
from reweight.forwards import Beginning, ExitForward, LossFunction, plain_attention, require_graph
from reweight.hypergradient import ESTIMATORS, estimate
from reweight.learner import ReweighterLearner
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.objectives import BudgetedObjective, Objective
from reweight.problem import FirstForward, meta_problem
from reweight.result import StepResult, Update
from reweight.reweighter import SampleReweighter, check_choice
from reweight.updates import (
    AnyOptimizer,
    Exactness,
    Parameters,
    PseudoUpdate,
    as_optimizers,
    check_differentiable,
    clip_gradients,
    held_by,
    held_parameters,
    pseudo_update,
)
from reweight.values import Values


class MetaReweightStep:
    """Takes the place of ``loss.backward()``: learns the weights, then adds the weighted gradient.

    The reweighter is trained by differentiating the loss on the meta batch, after the optimizer's
    next step, with respect to the weights of that step. Everything else stays with the caller:
    ``optimizer.step()``, clipping, accumulation, schedulers. The extra passes use batch statistics,
    leave the buffers alone and replay the random state, so that with weights of 1 training is
    bitwise what it would be without.

    Args:
        model: returns the logits of K exits, see :func:`exit_cross_entropy` for the forms.
        optimizer: one, or a list of several, of torch.optim or torchopt, over the model's
            parameters; groups, learning rates and state are read at every step and never changed.
            A bare gradient transformation of torchopt gets an optimizer: ``step.optimizers[0]``.
        reweighter: g, with the model's number of exits.
        reweighter_optimizer: moves the reweighter. Default, as published: Adam with weight decay
            1e-4 and learning rate 1e-4, or 1e-3 for the sigmoid form.
        objective: the meta loss. Default ``BudgetedObjective()``.
        interval: update the reweighter at every interval-th call of ``backward``, beginning with
            the first. Default 1 (the publication uses 1 for CIFAR, 100 for ImageNet).
        estimator: "forward" (exact, one forward-mode pass), "finite_difference" (approximate, two
            forwards), "unrolled" (exact, double backward; slower and larger, for reference), or
            "auto" (default): forward, until an operation of the model has no forward mode, and
            finite differences from then on; the log says which operation it was.
        pseudo_update: "exact" (default), or "gradient_descent": judge the weights by a plain
            gradient step with the optimizer's learning rate. An approximation, for optimizers whose
            own step cannot be differentiated.
        loss: (logits, target) → :class:`ExitLosses` or losses [B, K].
        exits: takes the logits out of what the model returns. Default None: it returns them.
        clip_grad_norm: the norm to which you clip the gradient of the optimizer's parameters before
            ``optimizer.step()``, so that the pseudo update does so too. Calling the step clips by
            itself. Default: no clipping.
        clip_hypergradient: the largest norm of ∂L_meta/∂w that reaches the reweighter; larger ones
            are scaled down to it. Default: any.
        scaler: the GradScaler you train with, so that gradients are scaled as by
            ``scaler.scale(loss).backward()``. It is never stepped, updated or unscaled here.
        lean: give up the graph of the train batch before the meta pass and make it again after it:
            about the memory of a plain step, for one more forward; the same results. Default: keep.

    Raises:
        TypeError: the optimizer's step cannot be differentiated.
        ValueError: an argument is out of range, or the optimizer holds none of the parameters.

    Example:
        >>> model = nn.Linear(4, 3)  # a single exit; with more, return the logits of each
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=1))
        >>> train, meta = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
        >>> result = step.backward(train, meta)
        >>> result.weights.shape
        torch.Size([6, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer | GradientTransformation | Sequence[AnyOptimizer],
        reweighter: SampleReweighter,
        *,
        reweighter_optimizer: Optimizer | None = None,
        objective: Objective | None = None,
        interval: int = 1,
        estimator: str = "auto",
        pseudo_update: Exactness = "exact",
        loss: LossFunction = exit_cross_entropy,
        exits: Callable[[Any], Any] | None = None,
        clip_grad_norm: float | None = None,
        clip_hypergradient: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        lean: bool = False,
    ) -> None:
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("pseudo_update", pseudo_update, ("exact", "gradient_descent"))
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"`clip_grad_norm` must be positive, got {clip_grad_norm}.")
        self.model, self.reweighter = model, reweighter
        self.optimizers = as_optimizers(optimizer, list(model.parameters()))
        for one in self.optimizers:
            check_differentiable(one, pseudo_update)
        self._learner = ReweighterLearner(reweighter, reweighter_optimizer, clip_hypergradient)
        self.objective = BudgetedObjective() if objective is None else objective
        self.interval, self.estimator, self.pseudo_update = interval, estimator, pseudo_update
        self.clip_grad_norm, self.scaler, self.lean = clip_grad_norm, scaler, lean
        self.num_calls = 0
        self._forward = ExitForward(model, exits, loss)
        if not self._held_parameters():
            raise ValueError(
                "`optimizer` must hold parameters of `model`, got one that holds none of them. "
                "Create it from model.parameters(), after moving the model to its device."
            )

    def __call__(self, train: Batch, meta: Batch) -> StepResult:
        """``zero_grad``, :meth:`backward`, clipping if it is asked for, and ``optimizer.step``."""
        if self.scaler is not None and self.scaler.is_enabled():
            raise ValueError(
                "`scaler` steps the optimizer itself: call step.backward, scaler.step(optimizer) "
                "and scaler.update() in its place."
            )
        parameters = list(held_by(self.optimizers))
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            result = self.backward(train, meta)
        except BaseException:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            raise
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._held_parameters().values(), self.clip_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return result

    def backward(self, train: Batch, meta: Batch, *, scale: float = 1.0) -> StepResult:
        """Update the reweighter if it is due, then add the gradient of L_tr to ``.grad``.

        What ``.grad`` holds already counts as part of the optimizer's next step.

        Args:
            train: (inputs, target) of the batch to train on.
            meta: (inputs, target) of the batch that judges the step.
            scale: factor of the gradient; 1/n where the gradients of n calls are accumulated for
                one step, so that they add up to a mean.

        Returns:
            :class:`StepResult`.

        Raises:
            TypeError: a batch is not a pair, or the model returns something unexpected.
            ValueError: shapes or numbers of exits disagree, a batch is empty, a target is out of
                range, or no loss depends on a parameter. Nothing has changed then, unless the very
                last backward fails while gradients are accumulated.
        """
        train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
        beginning = Beginning(self.model)
        gradients, update = {p: p.grad for p in self.model.parameters()}, None
        try:
            with self._attention():
                due = self.num_calls % self.interval == 0 and self._learner.is_trainable
                values = Values()
                losses = require_graph(self._forward(*train, within=values if due else None))
                if due:
                    held = self._held_parameters().items()
                    accumulated = {n: p.grad.detach() for n, p in held if p.grad is not None}
                    first = FirstForward(train, beginning, losses, values)
                    update = self._update(first, meta, accumulated, scale)
                    if self.lean:  # once more from the beginning: the same losses, a new graph
                        beginning.restore()
                        losses = self._forward(*train)
                with torch.no_grad():
                    weights = self._learner.weights(losses)
                coefficients = scale * losses.sample_shares() * weights
                losses.losses.backward(self._scaled(coefficients))
        except BaseException:
            beginning.restore()
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            if update is not None:
                update.undo()
            raise
        self.num_calls += 1
        return StepResult.of(losses, weights, update)

    def update_reweighter(self, train: Batch, meta: Batch) -> StepResult:
        """Update the reweighter and nothing else, for loops that keep their own forward.

        Parameters, buffers, ``.grad``, optimizer state and random state stay bitwise as they are.
        What ``.grad`` holds and ``interval`` play no part; arguments, returns and errors are those
        of :meth:`backward`.
        """
        train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
        if not self._learner.is_trainable:
            raise ValueError(
                "`reweighter` must have a trainable parameter to be updated, got none."
            )
        beginning, values = Beginning(self.model), Values()

        def learn(losses: ExitLosses) -> StepResult:
            first = FirstForward(train, beginning, require_graph(losses), values)
            update = self._update(first, meta, {}, 1.0)
            with torch.no_grad():
                return StepResult.of(losses, self._learner.weights(losses), update)

        try:
            with self._attention():
                return self._forward.at({}, beginning.buffers, *train, learn, within=values)
        finally:
            beginning.random_state.restore()

    def state_dict(self) -> dict[str, Any]:
        """Everything the step adds to a training run: tensors, numbers, text and containers."""
        return {**self._learner.state_dict(), "num_calls": self.num_calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: it is of another kind, or of another reweighter. Nothing has been loaded
                then.
        """
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(
                f"`state_dict` must have the keys {sorted(self.state_dict())}, got "
                f"{sorted(state_dict)}."
            )
        self._learner.load_state_dict(state_dict)
        self.num_calls = state_dict["num_calls"]

    def _update(
        self,
        first: FirstForward,
        meta: Batch,
        accumulated: Parameters,
        scale: float,
    ) -> Update:
        """Learn from one meta step after the forward of the train batch."""
        if not accumulated:
            self._learner.warn_if_cold(self.optimizers)
        losses, parameters, after = first.losses, self._held_parameters(), Beginning(self.model)

        def update(gradients: Parameters) -> PseudoUpdate:
            if self.clip_grad_norm is not None:
                gradients = clip_gradients(gradients, self.clip_grad_norm)
            return pseudo_update(self.optimizers, parameters, gradients, self.pseudo_update)

        weights = self._learner.weights(losses)
        problem = meta_problem(
            forward=self._forward,
            model=self.model,
            objective=self.objective,
            first=first,
            keep_graph=not self.lean,
            meta=meta,
            weights=weights,
            parameters=parameters,
            accumulated=accumulated,
            update=update,
            scale=scale,
            grad_scale=None if self.scaler is None else self._scaled(losses.losses.new_ones(())),
        )
        hypergradient, self.estimator = estimate(self.estimator, problem)
        after.restore()  # buffers too: checkpointing runs the model again in each backward
        return self._learner.learn(losses, weights, hypergradient)

    @property
    def reweighter_optimizer(self) -> Optimizer | None:
        """What moves the reweighter; None where there is nothing to move."""
        return self._learner.optimizer

    @property
    def num_skipped(self) -> Tensor:
        """How many updates of the reweighter were left out for a value that was not finite."""
        return self._learner.num_skipped

    def _held_parameters(self) -> Parameters:
        return held_parameters(self.model, self.optimizers)

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self.scaler is None else self.scaler.scale(tensor)

    def _attention(self) -> AbstractContextManager[None]:
        return plain_attention() if self.estimator == "unrolled" else nullcontext()
