"""MetaReweightStep: the order of events in one training step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchopt.base import GradientTransformation

from reweight._checks import check_flag, check_positive
from reweight._meta.estimators import Estimator
from reweight._meta.learner import ReweighterLearner
from reweight._meta.lookahead import Lookahead
from reweight._meta.problem import FirstForward, gradients_of
from reweight._optimizers.accepted import AnyOptimizer, Exactness, as_optimizers, held_by
from reweight._passes.compiled import CompiledModel, uncompiled_if_need_be
from reweight._passes.forward import ExitForward, LossFunction, require_graph
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.snapshots import Beginning, Gradients
from reweight._ranks.collectives import joined, num_ranks
from reweight._ranks.shards import begin_anew, parameters_of, sharded_modules
from reweight._ranks.wrappers import averages, is_unsettled, unwrap
from reweight.batches import Batch, tensors_of, unpack
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.objectives import BudgetedObjective, Objective
from reweight.result import StepResult, Update
from reweight.reweighter import SampleReweighter


class MetaReweightStep:
    """Takes the place of ``loss.backward()``: learns the weights, then adds the weighted gradient.

    The reweighter is trained by differentiating the loss on the meta batch, after the optimizer's
    next step, with respect to the weights of that step. Everything else stays with the caller:
    ``optimizer.step()``, clipping, accumulation, schedulers. The extra passes use batch statistics,
    leave the buffers alone and replay the random state, so that with weights of 1 training is
    bitwise what it would be without.

    Args:
        model: returns the logits of K exits, see :func:`exit_cross_entropy` for the forms. In
            ``DistributedDataParallel`` or sharded by ``fully_shard`` the step is that of the
            batches of all ranks joined.
        optimizer: one, or a list of several, of any class of torch.optim's form or of torchopt,
            over the model's parameters; groups, learning rates and state are read at every step and
            never changed. A class without a rule here has its own ``step`` recorded, and verified
            at its first use. A bare gradient transformation of torchopt gets an optimizer:
            ``step.optimizers[0]``.
        reweighter: g, with the model's number of exits.
        reweighter_optimizer: moves the reweighter. Default: AdamW, learning rate and weight decay
            1e-4 as published; the rate of the sigmoid form is 1e-3 times the interval, up to 1e-2.
        objective: the meta loss. Default ``BudgetedObjective()``.
        interval: update the reweighter at every interval-th call of ``backward``, accumulating
            ones too, beginning with the first. Default 1 (published: 1 CIFAR, 100 ImageNet).
        estimator: "forward" (exact, one forward-mode pass), "finite_difference" (approximate, two
            forwards), "unrolled" (exact, double backward, for reference), or "auto" (default):
            forward, or another where that fails; the log says which.
        pseudo_update: "exact" (default), or "gradient_descent": judge the weights by a plain
            gradient step with the optimizer's learning rate. An approximation, for optimizers whose
            own step has no derivative, as where it follows signs: the first update says so.
        loss: (logits, target) → :class:`ExitLosses` or losses [B, K].
        exits: takes the logits out of what the model returns. Default None: it returns them.
        clip_grad_norm: the norm to which you clip the gradient before ``optimizer.step()``, so that
            the pseudo update does so too. Calling the step clips by itself. Default: no clipping.
        clip_hypergradient: what the norm of ∂L_meta/∂w is scaled down to if larger. Default: any.
        scaler: the GradScaler you train with, so that gradients are scaled as by
            ``scaler.scale(loss).backward()``. It is never stepped, updated or unscaled here.
        lean: make the graph of the train batch twice, so as not to keep it during the meta pass:
            about the memory of a plain step, for one more forward; the same results. Default False.
        lagged: train first and learn from that step: saves a backward, or without a meta batch a
            meta pass as well, and what is learned acts one step later. Default False.
        train_fraction: the share of the train batch, drawn anew at each update, whose weights are
            learned from; the losses have the samples first. The faster, the noisier, unbiased but
            for batch statistics, and with dropout under other masks. Default 1.
        moves: parameter name → whether the look-ahead moves it: what the weights do through others,
            also to the norm that is clipped, is left out. Default: all of them.

    Raises:
        TypeError: the model is parallel otherwise, an argument is of another type, or, at the first
            update, the step of the optimizer has no derivative.
        ValueError: an argument is out of range, or another on another rank.

    Example:
        >>> model = nn.Linear(4, 3)  # a single exit; with more, return the logits of each
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=1))
        >>> train, meta = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
        >>> step.backward(train, meta).weights.shape
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
        lagged: bool = False,
        train_fraction: float = 1.0,
        moves: Callable[[str], bool] | None = None,
    ) -> None:
        check_flag("lean", lean)
        check_flag("lagged", lagged)
        self._inner, self._group = unwrap(model)
        self.model, self.reweighter, self.lean, self.lagged = model, reweighter, lean, lagged
        self.optimizers = as_optimizers(optimizer, list(model.parameters()))
        learning = reweighter_optimizer, interval, clip_hypergradient
        self._learner = ReweighterLearner(reweighter, *learning)
        self.reweighter_optimizer = self._learner.optimizer
        alone = self._group is None and estimator in ("auto", "forward")
        compiled = CompiledModel.of(self._inner) if alone else None
        self._forward = ExitForward(model, self._inner, exits, loss, compiled)
        self._lookahead = Lookahead(
            model=self._inner,
            forward=self._forward,
            optimizers=self.optimizers,
            objective=BudgetedObjective() if objective is None else objective,
            exactness=pseudo_update,
            clip_grad_norm=clip_grad_norm,
            scaler=scaler,
            train_fraction=train_fraction,
            moves=moves,
        )
        other_ways = lagged or train_fraction < 1 or sharded_modules(self._inner) or compiled
        self._estimator = Estimator(estimator, may_unroll=not other_ways)
        options = (estimator, interval, lean, lagged, train_fraction, clip_hypergradient)
        self._learner.require_same(options, self._group, next(model.parameters()).device)

    def __call__(self, train: Batch, meta: Batch | None = None) -> StepResult:
        """``zero_grad``, :meth:`backward`, clipping if it is asked for, and ``optimizer.step``."""
        scaler, max_norm = self._lookahead.scaler, self._lookahead.clip_grad_norm
        if scaler is not None and scaler.is_enabled():
            raise ValueError(
                "`scaler` steps the optimizer itself: call step.backward, scaler.step(optimizer) "
                "and scaler.update() in its place."
            )
        gradients = Gradients(held_by(self.optimizers))
        gradients.clear()
        try:
            result = self.backward(train, meta)
        except BaseException:
            gradients.restore()
            raise
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self._lookahead.held().values(), max_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return result

    @uncompiled_if_need_be
    def backward(
        self, train: Batch, meta: Batch | None = None, *, scale: float = 1.0
    ) -> StepResult:
        """Update the reweighter if it is due, then add the gradient of L_tr to ``.grad``.

        What ``.grad`` holds already counts as part of the optimizer's next step.

        Args:
            train: (inputs, target) of the batch to train on.
            meta: (inputs, target) of the batch that judges the step. With ``lagged`` it may be left
                out: then the train batch of the next call judges it, in the forward that it trains
                by. Call ``optimizer.step()`` in between, and leave this batch as it is until then.
            scale: factor of the gradient; 1/n where the gradients of n calls are accumulated for
                one step, so that they add up to a mean.

        Raises:
            TypeError: a batch is not a pair, or the model returns something unexpected.
            ValueError: shapes or numbers of exits disagree, a batch is empty or missing, a target
                is out of range, or no loss depends on a parameter. Nothing has changed then, unless
                the very last backward fails while gradients are accumulated.
        """
        check_positive("scale", scale)
        train = unpack(train, "`train`")
        if meta is not None:
            meta = unpack(meta, "`meta`")
        elif not self.lagged:
            raise TypeError("`meta` must be a pair (inputs, target) unless lagged=True, got None.")
        waiting, postponed = self._lookahead.still_waiting() if meta is None else None, None
        beginning, cache, update = Beginning(self._inner), PrimalCache(self._inner), None
        due = self._learner.is_due
        moved, lagged = self._lookahead.moved() if due else {}, due and self.lagged
        # If the backward is not the last thing that may fail, what it adds to must be copied.
        own = parameters_of(self._inner).values()
        gradients = Gradients([*own, *held_by(self.optimizers)], copy=lagged)
        # A static graph wants its first forward followed by its backward and by nothing else.
        unsettled = due and not lagged and is_unsettled(self.model)
        lean = self.lean or unsettled
        spare = self._forward.spare(train)
        cache.take(tensors_of(train), tensors_of(spare))
        forward = partial(self._forward, beginning=beginning)
        try:
            with self._estimator.attention(), joined(self._group), begin_anew(self._inner):
                within = cache if due and not lean else None
                batch = self._forward.spare(train) if due and lean else train
                losses = require_graph(forward(*batch, within=within, wrapped=not unsettled))
                shares = scale * losses.sample_shares()
                grads = gradients_of(moved, copy=lagged)  # whose backward has added to them by then
                first = FirstForward(
                    spare, beginning, losses, cache, moved, grads, shares, not lean
                )
                if waiting is not None:
                    update = self._update(waiting, losses)
                if due and not lagged and meta is not None:
                    update = self._update(first, meta)
                    if lean:  # once more from the beginning: the same losses, a new graph
                        beginning.restore()
                        losses = forward(*train)
                with torch.no_grad():
                    weights = self._learner.weights(losses)
                # Times the ranks, whose gradients DistributedDataParallel averages.
                coefficients = self._lookahead.scaled(num_ranks() * shares * weights)
                # The graph may be kept for its values, not for another backward.
                losses.losses.backward(coefficients, retain_graph=lagged and not lean)
                if lagged:
                    grads = gradients_of(moved, average=not averages(self.model))
                    first = first._replace(gradients=grads)
                    if meta is None:
                        postponed = self._lookahead.postponed(first, weights)
                    else:
                        update = self._update(first, meta)
        except BaseException:
            beginning.restore()
            gradients.restore()
            if update is not None:
                update.undo()
            raise
        self._learner.num_calls += 1
        self._lookahead.waiting = postponed
        return StepResult.of(losses, weights, update)

    @uncompiled_if_need_be
    def update_reweighter(self, train: Batch, meta: Batch) -> StepResult:
        """Update the reweighter and nothing else, for loops that keep their own forward.

        Parameters, buffers, ``.grad``, optimizer state and random state stay bitwise as they are.
        ``.grad`` and ``interval`` play no part; arguments and errors are as in :meth:`backward`.
        """
        train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
        self._learner.require_trainable()
        beginning, cache = Beginning(self._inner), PrimalCache(self._inner)
        moved, keep = self._lookahead.moved(), not self.lean

        def learn(losses: ExitLosses) -> tuple[ExitLosses, Tensor, Update]:
            shares = require_graph(losses).sample_shares()
            first = FirstForward(train, beginning, losses, cache, moved, {}, shares, keep)
            update = self._update(first, meta)
            with torch.no_grad():
                return losses, self._learner.weights(losses), update

        try:
            with self._estimator.attention(), joined(self._group), begin_anew(self._inner):
                learnt = self._forward.at({}, beginning.buffers, *train, learn, within=cache)
        finally:
            beginning.replay()
        return StepResult.of(*learnt)

    def state_dict(self) -> dict[str, Any]:
        """Everything the step adds to a training run: tensors, numbers, text and containers."""
        return self._learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, or raise ValueError with nothing loaded."""
        self._learner.load_state_dict(state_dict)
        self._lookahead.waiting = None

    def _update(self, first: FirstForward, meta: Batch | ExitLosses) -> Update:
        """Learn from one meta step after the forward of the train batch."""
        if not first.accumulated:
            self._learner.warn_if_cold(self.optimizers)
        after, weights = Beginning(self._inner), self._learner.weights(first.losses)
        seed = self._learner.num_updates
        problem = self._lookahead.problem(first, meta, weights, seed)
        owned = Gradients([*problem.everything.values(), *held_by(self.optimizers)])
        with owned.taken_away():  # a backward within the model's own may add to them
            hypergradient = self._estimator(problem)
        after.restore()  # buffers too: checkpointing runs the model again in each backward
        update = self._learner.learn(first.losses, weights, hypergradient)
        self._estimator.check.expect(update.difference, problem.precision)
        return update

    @property
    def num_skipped(self) -> Tensor:
        """How many updates of the reweighter were left out for a value that was not finite."""
        return self._learner.num_skipped

    @property
    def estimator(self) -> str:
        """The estimator in use; "auto" is forward mode, as long as it stands here."""
        return self._estimator.name
